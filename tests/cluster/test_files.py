# SPDX-License-Identifier: Apache-2.0
"""The files of docker and launch/k8s keep what they promise, and agree with each other."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

import flora_dist
from flora_dist import cli
from flora_dist.cluster.launch.hosts import read_hostfile
from flora_dist.trainer.configfile import load_config
from tests.cluster.test_entrypoint import written

ROOT = Path(__file__).resolve().parents[2]
DOCKER, K8S = ROOT / "docker", ROOT / "launch" / "k8s"
ENTRYPOINT = DOCKER / "entrypoint.sh"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, continued lines joined, comments out."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def values(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def resources(name: str) -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((K8S / name).read_text())}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "job.yaml", resources("job.yaml")["Job"]["spec"]["template"]["spec"]
    for name in ("trainjob.yaml", "deepspeed.yaml"):
        runtime = resources(name)["TrainingRuntime"]["spec"]["template"]["spec"]
        for job in runtime["replicatedJobs"]:
            yield name, job["template"]["spec"]["template"]["spec"]


# The image


def test_the_dockerfile_asks_no_registry_for_a_frontend() -> None:
    assert not re.search(r"^#\s*syntax\s*=", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)


def test_the_image_does_not_run_as_root() -> None:
    users = values("USER")
    assert users == ["${USER_ID}"], "the last stage's user, by number: runAsNonRoot looks at it"
    defaults = [rest for rest in values("ARG") if rest.startswith("USER_ID=")]
    assert defaults == ["USER_ID=1000"]
    for name, pod in pods():
        assert pod["securityContext"]["runAsUser"] == 1000, name


def test_every_pip_that_downloads_does_it_with_mounted_secrets_and_none_is_copied() -> None:
    downloading = [rest for rest in values("RUN") if "environment.sh" in rest]
    assert len(downloading) == 1
    assert "--mount=type=secret,id=pip_conf" in downloading[0]
    assert "--mount=type=secret,id=ca_bundle" in downloading[0]
    other = [rest for rest in values("RUN") if "pip install" in rest]
    assert all("--no-index" in rest for rest in other)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored.index("!docker") < ignored.index("docker/keys"), "a later line wins"


def test_the_image_names_its_version_licence_and_base() -> None:
    assert f"VERSION={flora_dist.__version__}" in values("ARG")
    (labels,) = values("LABEL")
    for name in ("version", "licenses", "source", "base.name", "title", "description"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert 'licenses="Apache-2.0"' in labels


def test_the_image_has_a_healthcheck_and_the_entry_point() -> None:
    assert len(values("HEALTHCHECK")) == 1
    assert values("ENTRYPOINT") == ['["entrypoint.sh"]']


def test_the_image_installs_the_constraints_and_the_extras_that_exist() -> None:
    assert any("launch/constraints.txt" in rest for rest in values("COPY"))
    script = (DOCKER / "environment.sh").read_text()
    assert "-c constraints.txt" in script
    (extras,) = re.findall(r"EXTRAS=(\S+)", script)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


# What has to agree


def test_nodes_find_each_other_on_one_port_as_one_user_with_the_same_keys() -> None:
    ssh = (DOCKER / "ssh_config").read_text()
    (port,) = re.findall(r"^\s*Port (\d+)$", ssh, re.MULTILINE)
    assert f"PORT={port}\n" in ENTRYPOINT.read_text()
    assert int(port) >= 1024, "sshd is not root"
    (user,) = re.findall(r"^\s*User (\w+)$", ssh, re.MULTILINE)
    assert any(re.search(rf"useradd .* {user}\b", rest) for rest in values("RUN"))
    assert "IdentityFile ~/.ssh/client_key" in ssh
    taken = re.findall(r"^    take_key (\w+)$", ENTRYPOINT.read_text(), re.MULTILINE)
    for name, service in compose()["services"].items():
        assert service["secrets"] == taken, name
    assert list(compose()["secrets"]) == taken


def test_the_hostfile_names_the_nodes_of_the_compose_file() -> None:
    hosts = [host.name for host in read_hostfile(DOCKER / "hostfile")]
    services = compose()["services"]
    assert hosts == list(services)
    assert [service["hostname"] for service in services.values()] == hosts


def test_nodes_have_no_more_rights_than_they_need() -> None:
    for name, service in compose()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert "network_mode" not in service, name
        assert "ports" not in service, "nothing outside needs to reach a node"
    for name, pod in pods():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert pod["automountServiceAccountToken"] is False, name


def test_what_the_compose_file_and_the_pods_set_goes_to_every_node() -> None:
    given = set(compose()["services"]["node1"]["environment"])
    for name, pod in pods():
        pod_gives = {each["name"] for each in pod["containers"][0]["env"]}
        assert pod_gives <= given, name
    exported = written(dict.fromkeys(given, "1"))
    assert given <= set(exported)


def test_every_node_keeps_what_it_writes_and_has_shared_memory() -> None:
    for name, service in compose()["services"].items():
        assert "runs:/workspace/runs" in service["volumes"], name
        assert service["shm_size"] == "1gb", name
    for name, pod in pods():
        mounts = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert "persistentVolumeClaim" in volumes[mounts["/workspace/runs"]], name
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory", name
        claim = volumes[mounts["/workspace/runs"]]["persistentVolumeClaim"]["claimName"]
        assert claim == resources(name)["PersistentVolumeClaim"]["metadata"]["name"], name


# What they start


def trains(words: list[str]) -> None:
    """The words after torchrun's own start the trainer with a config that the image has."""
    parsed = get_args_parser().parse_args(words)
    assert parsed.module
    assert parsed.training_script == "flora_dist.trainer"
    arguments = parsed.training_script_args
    config = arguments[arguments.index("--config") + 1]
    sets = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
    assert arguments == ["--config", config, *(word for each in sets for word in ("--set", each))]
    assert any(rest.startswith("configs ") for rest in values("COPY"))
    load_config(ROOT / config, sets)


def test_the_job_starts_torchrun_with_its_index_as_node_rank() -> None:
    kinds = resources("job.yaml")
    job, service = kinds["Job"], kinds["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "command" not in container, "it would replace the image's entry point"
    assert container["args"][0] == "torchrun"
    trains([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"][1:]])
    parsed = get_args_parser().parse_args(
        [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"][1:]]
    )
    assert parsed.node_rank == 1
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(parsed.nnodes)
    assert parsed.master_addr == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert [port["port"] for port in service["spec"]["ports"]] == [parsed.master_port]
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert pod["restartPolicy"] == "Never", "podFailurePolicy works with no other"


def test_the_trainjob_starts_the_same_training_on_its_own_runtime() -> None:
    kinds = resources("trainjob.yaml")
    job, runtime = kinds["TrainJob"]["spec"], kinds["TrainingRuntime"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["runtimeRef"]["kind"] == "TrainingRuntime"
    args = job["trainer"]["args"]
    assert args[0] == "torchrun"
    trains(args[1:])
    theirs = resources("job.yaml")["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("-m") :] == theirs[theirs.index("-m") :]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    assert [each["name"] for each in dict(pods())["trainjob.yaml"]["containers"]] == ["node"]


def test_the_commands_in_the_readme_are_commands_of_flora_dist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (DOCKER / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"exec node1 flora-dist (launch .*)", text)
    assert len(commands) == 2
    for command in commands:
        words = [
            str(DOCKER / word) if word == "hostfile" else word for word in shlex.split(command)
        ]
        words[words.index("--master-addr") + 1] = "127.0.0.1"
        assert cli.main([words[0], "--dry-run", *words[1:]]) == 0, capsys.readouterr().err
        assert "flora_dist.trainer" in capsys.readouterr().out


# The checks that check.sh makes of these files


MISTAKES = [
    ("numProcPerNode", "procsPerNode", "procsPerNode"),
    ("torch: {}", "torch: {elasticPolicy: {minNodes: 1}}", "elasticPolicy"),
    ("kind: TrainJob", "kind: PyTorchJob", "PyTorchJob"),
    ("runtimeRef:", "trainingRuntimeRef:", "runtimeRef"),
    ("maxRestarts", "maxRestart", "failurePolicy.maxRestart"),
    ("claimName", "claimname", "claimName"),
    ("allowPrivilegeEscalation", "allowPrivilegeEscalations", "allowPrivilegeEscalations"),
    ("    numNodes: 2", "    numNodes: two", "numNodes: Input should be a valid integer"),
]


def lint(*paths: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(K8S / "_lint_trainjob.py"), *map(str, paths)]
    return subprocess.run(script, capture_output=True, text=True, timeout=120)


def test_a_mistake_in_the_trainjob_is_found_and_named(tmp_path: Path) -> None:
    text = (K8S / "trainjob.yaml").read_text()
    bad = []
    for right, wrong, _ in MISTAKES:
        assert right in text
        bad.append(tmp_path / f"{len(bad)}.yaml")
        bad[-1].write_text(text.replace(right, wrong))
    good = [K8S / "trainjob.yaml", K8S / "deepspeed.yaml"]
    done = lint(*bad, *good)
    assert done.returncode == 1
    for path, (_, _, named) in zip(bad, MISTAKES, strict=True):
        said = [line for line in done.stderr.splitlines() if line.startswith(f"{path}:")]
        assert any(named in line for line in said), (named, said)
    assert not any(str(path) in done.stderr for path in good)
