# SPDX-License-Identifier: Apache-2.0
"""A host looks at itself: software, compiler, limits, locks, config. No torch: it takes seconds."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flora_dist
from flora_dist.cluster.doctor.facts import (
    Build,
    ConfigFacts,
    EnvironmentLine,
    Gpu,
    HostFacts,
    Kernels,
    Limits,
)
from flora_dist.cluster.doctor.network_facts import look_at_network
from flora_dist.cluster.launch.locks import extensions_folder, locks
from flora_dist.cluster.launch.variables import DEEPSPEED_FILE
from flora_dist.kernels import presence

PACKAGES = (
    *("torch", "deepspeed", "flora-dist", "mpi4py", "numpy", "triton", "transformers"),
    *("datasets", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
_ANSWER_S = 20.0
"""Seconds for another program's answer: nvidia-smi takes ten without its daemon."""
_SHM_HELPER = "deepspeed_shm_comm"
_SAFE = frozenset("@%+=:,./-_")


def look(
    name: str, master: str, names: Mapping[str, str], config: str | None, mpi: bool, folder: str
) -> HostFacts:
    """All facts of this host.

    Args:
        name: of this host in the job.
        master: address where process 0 will listen.
        names: the job's hosts, whose addresses are asked for.
        config: the run's config file, to be read as this host sees it.
        mpi: whether mpi4py must work.
        folder: the working directory that a job would have.
    """
    gpus, gpu_trouble = _gpus()
    return HostFacts(
        name=name,
        python=platform.python_version(),
        packages=_packages(),
        source=source_digest(Path(next(iter(flora_dist.__path__)))),
        folder=folder if Path(folder).is_dir() else None,
        cpus=len(os.sched_getaffinity(0)),
        clock_ahead_s=time.time(),
        clock_doubt_s=0.0,
        gpus=gpus,
        gpu_trouble=gpu_trouble,
        network=look_at_network(master, names, os.environ),
        limits=_limits(),
        build=_build(bool(gpus)),
        kernels=kernels_of(os.environ),
        locks=tuple(locks()),
        lines=env_lines([Path.home(), Path(folder)], os.environ),
        mpi_trouble=_mpi_trouble() if mpi else None,
        config=None if config is None else read_config(Path(folder) / config),
    )


def kernels_of(environment: Mapping[str, str]) -> Kernels:
    """Which kernels a process with this environment would step by, and why not the compiled."""
    try:
        if presence.wanted(environment) == "torch":
            return Kernels(path="torch", reason="")
    except ValueError as error:
        return Kernels(path="none", reason=str(error))
    found = presence.look()
    return Kernels(path="torch" if found.path is None else "native", reason=found.reason)


def source_digest(package: Path) -> str:
    """SHA-256 of the Python files of a package, names included; its first 12 digits."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


def env_lines(folders: list[Path], environment: Mapping[str, str]) -> tuple[EnvironmentLine, ...]:
    """The bad lines of .deepspeed_env in these folders (DeepSpeed 0.19, launcher/runner.py:604)."""
    name = environment.get("DS_ENV_FILE", DEEPSPEED_FILE)
    found = []
    for path in dict.fromkeys(folder / name for folder in folders):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            variable, given, value = line.partition("=")
            breaks = not given or not variable.strip().isidentifier()
            odd = {each for each in value.strip() if not each.isalnum()} - _SAFE
            if breaks or odd:
                # The value may be a secret.
                shown = line if not given else f"{variable}=..."
                found.append(
                    EnvironmentLine(path=str(path), number=number, text=shown, breaks=breaks)
                )
    return tuple(found)


def read_config(path: Path) -> ConfigFacts:
    """Digest and seeds of a config in YAML or JSON."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        return ConfigFacts(digest="", seeds={}, trouble=error.strerror or str(error))
    digest = hashlib.sha256(raw).hexdigest()[:12]
    try:
        tree = _parsed(raw.decode(), path.suffix)
    except ValueError as error:
        return ConfigFacts(digest=digest, seeds={}, trouble=str(error).splitlines()[0])
    return ConfigFacts(digest=digest, seeds=dict(_seeds(tree, "")), trouble=None)


def _parsed(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    try:
        import yaml
    except ModuleNotFoundError:
        raise ValueError("reading YAML needs the package pyyaml, which is not there") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None


def _seeds(tree: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(tree, dict):
        return []
    found = []
    for key, value in tree.items():
        dotted = f"{where}.{key}" if where else str(key)
        found += [(dotted, str(value))] if key == "seed" else _seeds(value, dotted)
    return found


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        # KeyError, None: what is left of it has no version, by Python's.
        with suppress(metadata.PackageNotFoundError, KeyError):
            found[name] = metadata.version(name)
    return {name: version for name, version in found.items() if version}


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), None
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    trouble, out = _answer(command)
    if trouble is not None:
        return (), trouble
    rows = [line.rpartition(", ") for line in out.splitlines() if ", " in line]
    found = tuple(Gpu(name=name, driver=driver.strip()) for name, _, driver in rows)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found, None
    return found[
        : len([each for each in visible.split(",") if each.strip() not in {"", "-1"}])
    ], None


def _mpi_trouble() -> str | None:
    trouble, _ = _answer([sys.executable, "-c", "import mpi4py.MPI"])
    return trouble


def _answer(command: list[str]) -> tuple[str | None, str]:
    """What went wrong with a program, and its output."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_ANSWER_S:.0f} s", ""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    failed = (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else None
    return failed, done.stdout


def _limits() -> Limits:
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm = Path("/dev/shm")
    return Limits(
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else 0,
        open_files=sys.maxsize if files == resource.RLIM_INFINITY else files,
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        free_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def _build(has_gpus: bool) -> Build:
    # As torch.utils.cpp_extension (2.11 to 2.13): $CXX, else c++; ninja by PATH.
    compiler = os.environ.get("CXX", "c++").split()[0]
    suffix = "cuda" if has_gpus else "cpu"
    helper = extensions_folder(os.environ)
    ready = list(helper.glob(f"**/{_SHM_HELPER}/{_SHM_HELPER}.so")) if suffix == "cpu" else []
    return Build(
        compiler=shutil.which(compiler),
        ninja=shutil.which("ninja"),
        headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        ready=bool(ready),
        built_in=_helper_is_built_in(),
    )


def _helper_is_built_in() -> bool:
    found = find_spec("deepspeed")  # which imports nothing
    folders = found.submodule_search_locations if found is not None else None
    return any(
        next(Path(folder).glob(f"ops/comm/{_SHM_HELPER}_op*.so"), None) for folder in folders or []
    )
