# SPDX-License-Identifier: Apache-2.0
"""The locks of torch's compiler on a host; `frameworks/build_lock.py` says what they are.

A job killed while it compiles leaves one, and later jobs wait for it forever and say nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flora_dist.frameworks.build_lock import STALE_S as STALE_S
from flora_dist.frameworks.build_lock import owners


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """One lock, as this host sees it."""

    path: str
    age_s: float
    is_held: bool
    """By a process of this host."""
    owner: str | None = None
    """That process, in words."""


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
