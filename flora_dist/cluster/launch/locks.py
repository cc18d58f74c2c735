# SPDX-License-Identifier: Apache-2.0
"""Locks of torch's compiler whose owner is dead: whoever comes after waits for ever, in silence.

DeepSpeed compiles a helper at the first start on a CPU. torch guards that by a file `lock` which
its owner holds open; a job killed meanwhile leaves it (torch 2.11 to 2.13,
torch/utils/file_baton.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STALE_S = 600.0
"""Seconds after which a lock that no host of the job holds is stale: nothing of DeepSpeed's for the
CPU takes as long (25 to 210 s). A younger one may be held by a host beside the job, where the
folder is shared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """One lock, as this host sees it."""

    path: str
    age_s: float
    is_held: bool
    """By a process of this host."""


def locks(folder: str | None = None) -> list[Lock]:
    """The locks in torch's folder of extensions.

    ``folder``: the job's TORCH_EXTENSIONS_DIR, where it has one.
    """
    root = Path(folder) if folder else extensions_folder(os.environ)
    found = list(root.glob("**/lock")) if root.is_dir() else []
    held = _open_files() if found else set[str]()
    now = time.time()
    seen = []
    for path in found:
        with suppress(FileNotFoundError):  # its owner has just ended well
            age, is_held = now - path.stat().st_mtime, str(path.resolve()) in held
            seen.append(Lock(path=str(path), age_s=age, is_held=is_held))
    return seen


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where torch keeps what it compiles."""
    named = environment.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    cache = environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "torch_extensions"


def _open_files() -> set[str]:
    found = set()
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # ended, or another user's
            for link in descriptors.iterdir():
                with suppress(OSError):
                    found.add(str(link.readlink()))
    return found
