# SPDX-License-Identifier: Apache-2.0
"""Whether a library of these sources is on this machine. Standard library only: no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flora_dist.kernels.compiler import library_name

VARIABLE = "FLORA_DIST_KERNELS"
"""Environment variable: ``torch`` leaves the kernels out, ``native`` insists on them."""
REMEDY = "python -m flora_dist.kernels.build"


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """The library, or why there is none."""

    path: Path | None
    reason: str
    """Empty where there is one."""


def package_folder() -> Path:
    """Where a wheel has its library, and an editable install."""
    return Path(__file__).parent


def cache_folder() -> Path:
    """Where a user's own library stands who may not write to the package."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "flora_dist" / "kernels"


def look() -> Presence:
    """Find the library; nothing is loaded."""
    name = library_name()
    folders = [package_folder(), cache_folder()]
    path = next((each / name for each in folders if (each / name).is_file()), None)
    if path is not None:
        return Presence(path=path, reason="")
    others = [other for each in folders for other in sorted(each.glob("kernels-*.so"))]
    what = f"{others[0]} is of other sources" if others else "none are installed"
    return Presence(path=None, reason=f"{what}. Compile them once: {REMEDY}")


def wanted(environment: Mapping[str, str]) -> str:
    """``torch``, ``native`` or "": what the environment asks for.

    Raises:
        ValueError: it is none of these.
    """
    asked = environment.get(VARIABLE, "")
    if asked not in ("", "torch", "native"):
        raise ValueError(
            f"{VARIABLE} must be torch, native or unset; got {asked!r}. Correct it, or unset it."
        )
    return asked
