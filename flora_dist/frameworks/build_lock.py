# SPDX-License-Identifier: Apache-2.0
"""The lock under which torch compiles: whose it is, and a word to whoever waits for it.

DeepSpeed compiles a helper where it first needs one. torch guards that by a file `lock`, which its
owner holds open, and who finds one waits until it is gone (torch/utils/file_baton.py, 2.11 to
2.13): for ever where the owner was killed, and without a word. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flora_dist.world import MARK

STALE_S = 600.0
"""Seconds after which a lock that nobody holds is stale: nothing of DeepSpeed's for the CPU takes
as long (25 to 210 s). A younger one may be held by another machine, where the folder is shared."""
SAY_S = 30.0
"""Seconds of waiting after which it is told."""
AGAIN_S = 300.0
_POLL_S = 1.0
_SHOWN = 60


class _GivenUp(BaseException):
    """Raised where a thread waits for a stale lock."""


def owners(paths: set[str]) -> dict[str, str]:
    """Which process of this machine holds each of these files open, in words; none: left out."""
    found = {}
    for descriptors in Path("/proc").glob("[0-9]*/fd") if paths else ():
        with suppress(OSError):  # ended, or another user's
            for link in descriptors.iterdir():
                with suppress(OSError):
                    path = str(link.readlink())
                    if path in paths:
                        found[path] = _named(descriptors.parent)
    return found


def words(path: str, age_s: float, owner: str | None) -> str:
    """What a person must know of a lock, and what to do."""
    if owner is not None:
        return (
            f"the lock {path}, {age_s:.0f} s old, is held by {owner}, which compiles: wait for it, "
            "or end it"
        )
    return (
        f"the lock {path}, {age_s:.0f} s old, is held by no process that is seen here: its owner "
        f"was killed, unless another machine or user compiles there. Remove it: rm {path}"
    )


@contextmanager
def telling() -> Iterator[None]:
    """While entered, this thread's wait for a lock is told on stderr.

    Raises:
        ValueError: under `flora-dist launch` the lock is stale: nobody will ever remove it.
    """
    over, given_up = threading.Event(), list[str]()
    watch = threading.Thread(
        target=_watch, args=(threading.get_ident(), over, given_up), daemon=True
    )
    watch.start()
    try:
        yield
    except _GivenUp:
        raise ValueError(f"DeepSpeed waits for a lock without end; {given_up[0]}.") from None
    finally:
        over.set()
        watch.join()


def _watch(thread: int, over: threading.Event, given_up: list[str]) -> None:
    waited_for, since, unheld_since, told = None, 0.0, 0.0, 0.0
    while not over.wait(_POLL_S):
        path, now = _awaited(thread), time.monotonic()
        if path is None or path != waited_for:
            waited_for, since, unheld_since, told = path, now, now, 0.0
            continue
        real = os.path.realpath(path)
        owner, age_s = owners({real}).get(real), _age(path)
        if owner is not None:
            unheld_since = now
        # Not at first sight: an owner closes the file before it removes it.
        if now - unheld_since >= SAY_S and age_s >= STALE_S and MARK in os.environ:
            given_up.append(words(path, age_s, owner))
            raised = ctypes.py_object(_GivenUp)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
            return
        if now - since >= SAY_S and (not told or now - told >= AGAIN_S):
            told = now
            _say(f"{now - since:.0f} s of waiting: {words(path, age_s, owner)}.")


def _awaited(thread: int) -> str | None:
    """The lock for which a thread of this process waits."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wait" and code.co_filename.endswith("file_baton.py"):
            return str(frame.f_locals["self"].lock_file_path)
        frame = frame.f_back
    return None


def _age(path: str) -> float:
    try:
        return time.time() - Path(path).stat().st_mtime
    except OSError:  # it is gone just now
        return 0.0


def _named(folder: Path) -> str:
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return f"process {folder.name} ({command.strip()[:_SHOWN]})"


def _say(text: str) -> None:
    # All ranks of a machine wait for the same one.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"flora_dist: {text}\n".encode())
