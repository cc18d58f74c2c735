# SPDX-License-Identifier: Apache-2.0
"""The shell scripts in the files for Kubeflow and SkyPilot, and what they start."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from flora_dist import cli
from tests.cluster.test_files import DOCKER, ROOT, pods, resources, trains


def starts(script: str, folder: Path, words: list[str], **variables: str) -> list[str]:
    """What a shell script of a job's file gives to the last program that it starts."""
    programs = {
        "flora-dist": 'printf "%s\\n" "$@" >"$GIVEN"',
        "torchrun": 'printf "%s\\n" "$@" >"$GIVEN"',
        "entrypoint.sh": 'ls "$FLORA_SECRETS" >"$GIVEN"; mkdir ~/.ssh; echo >~/.ssh/sshd_config',
    }
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name, text in programs.items():
        for place in (folder / name, folder / ".venv" / "bin" / name):
            place.write_text(f"#!/usr/bin/env bash\n{text}\n")
            place.chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    environment = {**given, "GIVEN": str(folder / "given"), **variables}
    command = ["bash", "-euc", script, *words]
    subprocess.run(command, env=environment, cwd=folder, check=True, timeout=60)
    return (folder / "given").read_text().splitlines()


def test_the_job_of_deepspeed_launches_the_trainer_with_zero_over_ssh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = resources("deepspeed.yaml")
    job, runtime = kinds["TrainJob"]["spec"], kinds["TrainingRuntime"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    policy = runtime["spec"]["mlPolicy"]
    node, launcher = (each["containers"][0] for name, each in pods() if name == "deepspeed.yaml")
    (port,) = re.findall(r"^\s*Port (\d+)$", (DOCKER / "ssh_config").read_text(), re.MULTILINE)
    assert node["readinessProbe"]["tcpSocket"]["port"] == int(port)
    keys = tmp_path / "mounted"
    keys.mkdir()
    (keys / "id_rsa").write_text("key")
    places = {policy["mpi"]["sshAuthMountPath"]: str(keys), "/tmp/keys": str(tmp_path / "keys")}

    def moved(script: str) -> str:
        for path, place in places.items():
            assert path in script
            script = script.replace(path, place)
        return script

    assert node["command"] == ["bash", "-euc"]
    assert starts(moved(node["args"][0]), tmp_path / "node", []) == ["client_key", "host_key"]
    (tmp_path / "keys").rename(tmp_path / "of-the-node")
    assert launcher["command"][:2] == ["bash", "-euc"]
    words = [*launcher["command"][3:], *job["trainer"]["args"]]
    given = starts(moved(launcher["command"][2]), tmp_path / "launcher", words)
    (tmp_path / "hostfile").write_text("flora-zero-launcher-0-0.flora-zero slots=1\n")
    given[given.index("/etc/mpi/hostfile")] = str(tmp_path / "hostfile")
    there = ["--dry-run", "--master-addr", "127.0.0.1"]
    assert cli.main([given[0], *there, *given[1:]]) == 0, capsys.readouterr().err
    assert "mpirun" in capsys.readouterr().out
    trains(job["trainer"]["args"])


def test_skypilots_job_starts_torchrun_on_each_of_its_nodes(tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    ranks = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    more = {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    given = starts(task["run"], tmp_path, [], **ranks, **more, **task["envs"])
    parsed = get_args_parser().parse_args(given)
    assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("2", 1, "8")
    assert parsed.master_addr == "10.0.0.1"
    trains(given)
    (output,) = [word for word in given if word.startswith("output.folder=")]
    assert output.removeprefix("output.folder=") in task["file_mounts"]
    extras = re.findall(r'"\.\[(\S+)\]"', task["setup"])
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for each in extras for extra in each.split(","))
