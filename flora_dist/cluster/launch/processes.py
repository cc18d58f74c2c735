# SPDX-License-Identifier: Apache-2.0
"""The processes of a job on this host, found by a mark in their environment, and their end.

Launchers put workers in sessions of their own and leave some behind when they are killed; a mark
that every process inherits finds them all, whoever started them. Linux (/proc).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flora_dist.world import MARK as MARK

_RANK_NAMES = (b"RANK", b"OMPI_COMM_WORLD_RANK")
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of a job."""

    pid: int
    parent: int
    has_rank: bool
    """It was started as a worker, or by one: a launcher has no rank of its own."""
    started: int
    """Clock ticks since boot: with the pid it names a process for ever."""


def of_job(job: str) -> list[Process]:
    """The job's living processes here, as this user may see them."""
    mark = f"{MARK}={job}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError, IndexError):  # it ended meanwhile, or is another user's
            variables = (folder / "environ").read_bytes().split(b"\0")
            if mark not in variables:
                continue
            # The name in parentheses may hold spaces and parentheses itself.
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            if fields[0] in "ZX":
                continue
            names = {variable.partition(b"=")[0] for variable in variables}
            found.append(
                Process(
                    pid=int(folder.name),
                    parent=int(fields[1]),
                    has_rank=any(name in names for name in _RANK_NAMES),
                    started=int(fields[19]),
                )
            )
    return found


def workers(processes: Iterable[Process]) -> list[Process]:
    """Those that launchers started as ranks; not what these started in turn.

    A signal to a data loader's process would fail its worker, which could have saved and ended.
    """
    ranked = {process.pid: process for process in processes if process.has_rank}
    return [process for process in ranked.values() if process.parent not in ranked]


def signal_each(processes: Iterable[Process], number: signal.Signals) -> None:
    """Send a signal to all that still live."""
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


def end_all(job: str, *, patience_s: float) -> int:
    """SIGTERM, and SIGKILL for those that have not ended after ``patience_s``; how many there were.

    Looks again after each round: a launcher may start a process while it is being ended.
    """
    ended: set[tuple[int, int]] = set()
    deadline = time.monotonic() + patience_s
    asked: set[tuple[int, int]] = set()
    while living := of_job(job):
        ended |= {(process.pid, process.started) for process in living}
        if time.monotonic() >= deadline:
            signal_each(living, signal.SIGKILL)
        else:
            fresh = [each for each in living if (each.pid, each.started) not in asked]
            signal_each(fresh, signal.SIGTERM)
            asked |= {(process.pid, process.started) for process in fresh}
        time.sleep(_POLL_S)
    return len(ended)


def end_with_parent() -> None:
    """Between fork and exec: this process gets a SIGTERM when its parent is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
