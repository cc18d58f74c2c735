# SPDX-License-Identifier: Apache-2.0
"""Rules on what is installed: hosts must agree, and what is needed must be there."""

from __future__ import annotations

from collections.abc import Iterator

from flora_dist.cluster.doctor.facts import EnvironmentLine
from flora_dist.cluster.doctor.survey import Finding, Survey, error, groups, warning
from flora_dist.cluster.launch.locks import STALE_S
from flora_dist.kernels.presence import VARIABLE

_MUST_AGREE = frozenset(
    ("torch", "deepspeed", "flora-dist", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
)
_MISSING = "missing"


def python_agrees(survey: Survey) -> Iterator[Finding]:
    """Minor versions change pickles and bytecode; patches seldom anything."""
    versions = {host.name: host.python for host in survey.facts}
    minors = {name: version.rpartition(".")[0] for name, version in versions.items()}
    remedy = "Give every host the same Python, or name another by --python."
    if differ := groups(minors):
        yield error("python", differ[1], f"Python differs: {differ[0]}", remedy)
    elif differ := groups(versions):
        yield warning("python", differ[1], f"Python's patch version differs: {differ[0]}", remedy)


def packages_agree(survey: Survey) -> Iterator[Finding]:
    """A package is of one version everywhere, or nowhere."""
    python = survey.asked.python
    for package in sorted({name for host in survey.facts for name in host.packages}):
        versions = {host.name: host.packages.get(package, _MISSING) for host in survey.facts}
        differ = groups(versions)
        if differ is None:
            continue
        words, few = differ
        wanted = next(each for each in versions.values() if each != _MISSING)
        kept = [each for name, each in versions.items() if name not in few and each != _MISSING]
        name = f"{package}=={kept[0] if kept else wanted}"
        say = error if package in _MUST_AGREE else warning
        yield say(
            "package", few, f"{package} differs: {words}",
            f"Install one version everywhere: {python} -m pip install {name}",
        )  # fmt: skip


def source_agrees(survey: Survey) -> Iterator[Finding]:
    """Equal versions may hide changed files."""
    differ = groups({host.name: host.source for host in survey.facts})
    if differ:
        yield error(
            "source", differ[1],
            f"the source files of flora_dist differ: digest {differ[0]}",
            "Install the same wheel or check out the same commit on every host.",
        )  # fmt: skip


def torch_is_there(survey: Survey) -> Iterator[Finding]:
    """Where it is missing everywhere, no rule of agreement says so."""
    without = [host.name for host in survey.facts if "torch" not in host.packages]
    if survey.facts and len(without) == len(survey.facts):
        yield error(
            "package", without, f"torch is missing on {', '.join(without)}",
            f"Install it: {survey.asked.python} -m pip install torch",
        )  # fmt: skip


def mpi_works(survey: Survey) -> Iterator[Finding]:
    """The deepspeed launcher's openmpi and scripts under mpirun find their rank by mpi4py."""
    for host in survey.facts:
        if host.mpi_trouble is not None:
            yield error(
                "mpi4py", [host.name],
                f"mpi4py cannot be imported on {host.name}: {host.mpi_trouble}",
                f"apt-get install libopenmpi-dev, then {survey.asked.python} -m pip install mpi4py",
            )  # fmt: skip


def cpu_helper_builds(survey: Survey) -> Iterator[Finding]:
    """DeepSpeed on CPUs compiles `deepspeed_shm_comm` in init_distributed, or fails there."""
    for host in survey.facts:
        if "deepspeed" not in host.packages or host.gpus:
            continue
        build = host.build
        if build.built_in:
            continue
        missing = {
            "ninja": build.ninja is None,
            # What has been compiled already is only loaded; ninja is asked all the same.
            "g++": build.compiler is None and not build.ready,
            "Python.h": not build.headers and not build.ready,
        }
        remedies = {
            "ninja": f"{survey.asked.python} -m pip install ninja",
            "g++": "apt-get install g++",
            "Python.h": "apt-get install python3-dev",
        }
        for name, is_missing in missing.items():
            if is_missing:
                yield error(
                    "compiler", [host.name],
                    f"{name} is missing on {host.name}: DeepSpeed compiles its helper for CPUs at "
                    "the first start and fails without it",
                    f"{remedies[name]} (on {host.name})",
                )  # fmt: skip


def kernels_are_there(survey: Survey) -> Iterator[Finding]:
    """Without compiled kernels a step on CPUs takes torch's operators, and many times longer."""
    for host in survey.facts:
        if host.gpus or not host.kernels.reason:
            continue
        if host.kernels.path == "none":
            yield error(
                "kernels", [host.name], f"no job can start on {host.name}: {host.kernels.reason}",
                f"unset {VARIABLE} (in the environment of the job)",
            )  # fmt: skip
        else:
            yield warning(
                "kernels", [host.name],
                f"steps on {host.name} go by torch's operators, which are slower than compiled "
                f"kernels: {host.kernels.reason}",
                f"{survey.asked.python} -m flora_dist.kernels.build (on {host.name})",
            )  # fmt: skip


def locks_are_held(survey: Survey) -> Iterator[Finding]:
    """A lock that a dead process has left: whoever compiles next waits forever and says nothing."""
    # On a folder that hosts share, another one's process may hold it.
    held = {lock.path for host in survey.facts for lock in host.locks if lock.is_held}
    for host in survey.facts:
        for lock in host.locks:
            if lock.age_s > STALE_S and lock.path not in held:
                yield error(
                    "lock", [host.name],
                    f"stale lock of a dead compilation on {host.name}: {lock.path}; the next job "
                    "would wait there forever",
                    f"rm {lock.path} (on {host.name}, while no job compiles)",
                )  # fmt: skip


def env_file_reads(survey: Survey) -> Iterator[Finding]:
    """DeepSpeed's launcher splits every line at its "=", an empty one too."""
    seen: dict[EnvironmentLine, list[str]] = {}
    for host in survey.facts:
        for line in host.lines:
            seen.setdefault(line, []).append(host.name)
    for line in survey.asked.lines:
        seen.setdefault(line, ["this machine"])  # where this machine is not among the hosts
    for line, names in seen.items():
        place = f"line {line.number} of {line.path} on {', '.join(names)}"
        if line.breaks:
            yield error(
                "deepspeed_env", names,
                f"{place} is not NAME=VALUE: {line.text!r}; DeepSpeed's launcher fails on it",
                "Remove or correct the line; blank lines and comments break it too.",
            )  # fmt: skip
        else:
            yield warning(
                "deepspeed_env", names,
                f"{place} has a value with spaces or quotes ({line.text}): pdsh and Open MPI "
                "read it differently",
                "Use only letters, digits and @%+=:,./-_ in values.",
            )  # fmt: skip


def configs_agree(survey: Survey) -> Iterator[Finding]:
    """Flora's ranks share a seed in place of matrices: another seed, another model."""
    configs = {host.name: host.config for host in survey.facts if host.config is not None}
    path = survey.asked.config
    for name, config in configs.items():
        if config.trouble is not None:
            yield error(
                "config", [name], f"the config {path} cannot be read on {name}: {config.trouble}",
                f"Put the file on {name} at the same path, or use a shared folder.",
            )  # fmt: skip
    read = {name: config for name, config in configs.items() if config.trouble is None}
    found = False
    for key in sorted({key for config in read.values() for key in config.seeds}):
        differ = groups({name: config.seeds.get(key, "unset") for name, config in read.items()})
        if differ:
            found = True
            yield error(
                "seed", differ[1], f"{key} of {path} differs: {differ[0]}",
                "Give every host the same seed: projections are drawn from it on each rank.",
            )  # fmt: skip
    differ = groups({name: config.digest for name, config in read.items()})
    if differ and not found:
        yield error(
            "config", differ[1], f"the config {path} differs: digest {differ[0]}",
            "Copy one file to every host.",
        )  # fmt: skip
