# SPDX-License-Identifier: Apache-2.0
"""What a host says of itself, as values: written there, read by whoever asked. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flora_dist.cluster.launch.locks import Lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface with an IPv4 address."""

    name: str
    address: str
    mtu: int
    """Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """As nvidia-smi names it."""

    name: str
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentLine:
    """A line of a .deepspeed_env that breaks DeepSpeed's launcher, or that two read differently."""

    path: str
    number: int
    text: str
    breaks: bool
    """The launcher ends with a traceback; else only its value is read in two ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFacts:
    """The run's config, as this host reads it."""

    digest: str
    seeds: Mapping[str, str]
    """Every key named seed, by its dotted path."""
    trouble: str | None
    """Why it could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the host grants a process."""

    shm_bytes: int
    """Size of /dev/shm."""
    open_files: int
    locked_bytes: int | None
    """Memory that may be locked; None: all."""
    free_bytes: int
    """Room on the disk of the working directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What DeepSpeed needs to compile its helper for the CPU."""

    compiler: str | None
    ninja: str | None
    headers: bool
    """Python.h is there."""
    ready: bool
    """The helper has been compiled already."""
    built_in: bool
    """DeepSpeed was installed with it: nothing is ever compiled (docker/Dockerfile)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Which kernels step float32 and 16-bit weights on this host's CPUs."""

    path: str
    """``native``: those that were compiled; ``torch``: torch's operators."""
    reason: str
    """Why torch's, though nobody asked for them; empty otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How a host sees itself and the others."""

    interfaces: tuple[Interface, ...]
    toward: str | None
    """The interface by which it reaches the master address."""
    names: Mapping[str, str | None]
    """Addresses of the job's hosts as they resolve here."""
    own: str | None
    """What its own host name resolves to."""
    gloo: str | None
    """GLOO_SOCKET_IFNAME of a rank there."""
    nccl: str | None
    """NCCL_SOCKET_IFNAME of a rank there."""
    infiniband: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Everything one host says."""

    name: str
    """In the hostfile."""
    python: str
    packages: Mapping[str, str]
    """Versions of those that are installed."""
    source: str
    """Digest of the files of flora_dist."""
    folder: str | None
    """The working directory; None where there is none of that name."""
    cpus: int
    clock_ahead_s: float
    """Of its clock before that of whoever asked."""
    clock_doubt_s: float
    """Half the time the question took."""
    gpus: tuple[Gpu, ...]
    gpu_trouble: str | None
    """nvidia-smi is there and failed: its last line."""
    network: Network
    limits: Limits
    build: Build
    kernels: Kernels
    locks: tuple[Lock, ...]
    lines: tuple[EnvironmentLine, ...]
    mpi_trouble: str | None
    """Why mpi4py cannot be imported; None where it can, or nobody asked."""
    config: ConfigFacts | None

    def interface(self) -> Interface | None:
        """The one that a rank there will use: what the environment names, else toward process 0."""
        wanted = self.network.gloo or self.network.toward
        names = wanted.split(",") if wanted else []
        has = {interface.name: interface for interface in self.network.interfaces}
        return next((has[name] for name in names if name in has), None)


def as_tree(facts: HostFacts) -> dict[str, Any]:
    """Plain values for JSON."""
    return asdict(facts)


def from_tree(tree: Mapping[str, Any]) -> HostFacts:
    """Facts as another process has written them.

    Raises:
        TypeError: fields that are missing or unknown: it is of another version.
        KeyError: the same.
    """
    network = dict(tree["network"])
    network["interfaces"] = tuple(Interface(**each) for each in network["interfaces"])
    config = tree["config"]
    return HostFacts(
        **{
            **tree,
            "network": Network(**network),
            "gpus": tuple(Gpu(**each) for each in tree["gpus"]),
            "limits": Limits(**tree["limits"]),
            "build": Build(**tree["build"]),
            "kernels": Kernels(**tree["kernels"]),
            "locks": tuple(Lock(**each) for each in tree["locks"]),
            "lines": tuple(EnvironmentLine(**each) for each in tree["lines"]),
            "config": None if config is None else ConfigFacts(**config),
        }
    )
