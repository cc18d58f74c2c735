# SPDX-License-Identifier: Apache-2.0
"""What was asked of the doctor, and all that came back: the values that rules and reports read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flora_dist.cluster.doctor.facts import EnvironmentLine, HostFacts
from flora_dist.cluster.doctor.links import Connection
from flora_dist.cluster.launch.hosts import Host

LOST = "lost"
"""The stage of ranks whose host no longer answers."""
Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    subject: str
    """One word for what it is about; the README lists them."""
    what: str
    """Names the host and the cause."""
    hosts: tuple[str, ...]
    severity: Severity
    remedy: str


def error(subject: str, hosts: Iterable[str], what: str, remedy: str) -> Finding:
    """A job will fail, hang or compute something else."""
    return Finding(subject=subject, what=what, hosts=tuple(hosts), severity="error", remedy=remedy)


def warning(subject: str, hosts: Iterable[str], what: str, remedy: str) -> Finding:
    """A job may run, slower or by luck."""
    return Finding(
        subject=subject, what=what, hosts=tuple(hosts), severity="warning", remedy=remedy
    )


def groups(values: Mapping[str, str]) -> tuple[str, tuple[str, ...]] | None:
    """How hosts differ in a value, as words, and which of them are the few; None: they agree.

    >>> groups({"a": "1", "b": "2", "c": "1"})
    ('1 on a, c; 2 on b', ('b',))
    """
    having: dict[str, list[str]] = {}
    for name, value in values.items():
        having.setdefault(value, []).append(name)
    if len(having) < 2:
        return None
    ordered = sorted(having.items(), key=lambda each: -len(each[1]))
    words = "; ".join(f"{value} on {', '.join(names)}" for value, names in ordered)
    most = len(ordered[0][1])
    few = [name for _, names in ordered if len(names) < most for name in names]
    return words, tuple(few or values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A checked command line."""

    hosts: tuple[Host, ...]
    master: str
    """Address where process 0 will listen."""
    port: int
    python: str
    folder: str
    environment: Mapping[str, str]
    """Sent to every host, over its own."""
    lines: tuple[EnvironmentLine, ...]
    """Bad lines of this machine's .deepspeed_env."""
    config: str | None
    seed: int | None
    mpi: bool
    """The job will be started by Open MPI: mpi4py must work."""
    minimum_mbit: float | None
    timeout_s: float
    """Of the process group."""
    ranks: bool
    """Whether ranks are to be started."""

    @property
    def is_cluster(self) -> bool:
        """More than one host."""
        return len(self.hosts) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two hosts."""

    source: str
    """The host that connected."""
    target: str
    address: str
    port: int
    measured: Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port that a host could not open."""

    host: str
    port: int
    trouble: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSaid:
    """What one rank came to."""

    host: str
    process_rank: int
    code: int | None
    """Its exit code; None: it was ended, because of another or for time."""
    stage: str
    result: Mapping[str, Any] | None
    error: str
    """Its last line of errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All that came back."""

    asked: Asked
    facts: tuple[HostFacts, ...] = ()
    """Of the hosts that answered."""
    links: tuple[Link, ...] = ()
    ports: tuple[Port, ...] = ()
    ranks: tuple[RankSaid, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    """What was not looked at, and why."""
