# SPDX-License-Identifier: Apache-2.0
"""Which process writes a checkpoint, read from the name of what it writes; whether it is alive.

A token names a machine's boot and namespace of processes, a process in it, when that process began,
and one save of it: "1f0c5a77-4242-991733-0d6b2e19". Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

TOKEN = re.compile(r"([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}")
STALE_SECONDS = 6 * 3600.0
"""Silence after which a save of another machine is taken for dead: its files grow while it writes,
and between the last byte and the rename stands only the hashing of what one rank has written."""

_current: set[str] = set()
"""Tokens of saves that this process has under way; with its number, since a fork inherits them."""


def new_token() -> str:
    """Of a save that begins now in this process."""
    pid = os.getpid()
    return f"{_machine()}-{pid}-{_started(pid)}-{secrets.token_hex(4)}"


def under_way(token: str) -> None:
    """Note that this process is saving under the token, until ``done``."""
    _current.add(token)


def done(token: str) -> None:
    """Note that whatever still bears the token is a leftover."""
    _current.discard(token)


def is_ours(token: str) -> bool:
    """Whether this process has made it."""
    machine, pid, started = _parts(token)
    return (machine, pid) == (_machine(), os.getpid()) and started == _started(pid)


def is_alive(token: str, path: Path) -> bool:
    """Whether the process that writes ``path`` may still be running.

    On this machine its process says so; on another the age of what it has written last.
    """
    if is_ours(token):
        return token in _current
    machine, pid, started = _parts(token)
    if machine != _machine():
        return silence_of(path) < STALE_SECONDS
    with suppress(PermissionError):  # another user's
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return _started(pid) in (started, 0)  # else its number was given to another process


def silence_of(path: Path) -> float:
    """Seconds since a file, or anything in a folder, was written last."""
    times = [0.0]
    for each in (path, *path.glob("*")):
        with suppress(OSError):  # gone meanwhile
            times.append(each.lstat().st_mtime)
    return time.time() - max(times)


def _parts(token: str) -> tuple[str, int, int]:
    match = TOKEN.fullmatch(token)
    assert match is not None, token
    return match[1], int(match[2]), int(match[3])


@lru_cache
def _machine() -> str:
    """Differs wherever the number of a process means another one: hosts, boots, containers."""
    marks = [platform.node()]
    with suppress(OSError):  # no Linux
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        marks.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]


def _started(pid: int) -> int:
    """When a process began, in ticks since the boot; 0 where the system does not say.

    A dead process whose parent has not asked for it yet counts as none, so as begun at -1.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0
