# SPDX-License-Identifier: Apache-2.0
"""The locks of torch's compiler on a host; `frameworks/build_lock.py` says what they are.

A job killed while it compiles leaves one, and later jobs wait for it forever and say nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from flora_dist.frameworks.build_lock import STALE_S as STALE_S
from flora_dist.frameworks.build_lock import owners

_TRAINER = ("-m", "flora_dist.trainer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """One lock, as this host sees it."""

    path: str
    age_s: float
    is_held: bool
    """By a process of this host."""
    owner: str | None = None
    """That process, in words."""


def may_wait_for_locks(program: Sequence[str]) -> bool:
    """Whether a program may compile, and so wait for a lock; nobody reads a script of the user's.

    The trainer does so on the deepspeed backend alone, which its arguments or its config names.
    ``program``: words for Python, as a job has them.
    """
    if tuple(program[:2]) != _TRAINER:
        return True
    words = " ".join(program[2:]).replace("--config=", "--config ").split()
    texts = list(words)
    for option, value in pairwise(words):
        if option == "--config":
            try:
                texts.append(Path(value).read_text(encoding="utf-8", errors="replace"))
            except OSError:  # the trainer will say so; until then nothing is known
                return True
    return any("deepspeed" in text for text in texts)


def locks(folder: str | None = None) -> list[Lock]:
    """The locks in torch's folder of extensions.

    ``folder``: the job's TORCH_EXTENSIONS_DIR, where it has one.
    """
    root = Path(folder) if folder else extensions_folder(os.environ)
    found = {path: str(path.resolve()) for path in root.glob("**/lock")} if root.is_dir() else {}
    held, now = owners(set(found.values())), time.time()
    seen = []
    for path, real in found.items():
        with suppress(FileNotFoundError):  # its owner has just ended well
            age, owner = now - path.stat().st_mtime, held.get(real)
            seen.append(Lock(path=str(path), age_s=age, is_held=owner is not None, owner=owner))
    return seen


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where torch keeps what it compiles."""
    named = environment.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    cache = environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "torch_extensions"
