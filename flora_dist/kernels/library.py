# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled kernels; says why where there are none. Nothing is compiled here."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flora_dist.kernels.compiler import digest, library_name

VARIABLE = "FLORA_DIST_KERNELS"
"""Environment variable: ``torch`` leaves the kernels out, ``native`` insists on them."""
REMEDY = "python -m flora_dist.kernels.build"
_CHOICES = ("", "torch", "native")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The kernels of this process, or why there are none."""

    operators: Any
    """``torch.ops.flora_dist_kernels``; None without kernels."""
    name: str
    """For reports: ``native (avx2)``, or ``torch``."""
    reason: str
    """Why there are no kernels; empty where there are, and where none are wanted."""

    @property
    def said(self) -> str:
        """For reports: the name, and the reason if there is one."""
        return f"{self.name}: {self.reason}" if self.reason else self.name


def package_folder() -> Path:
    """Where a wheel has its library, and an editable install."""
    return Path(__file__).parent


def cache_folder() -> Path:
    """Where a user's own library stands who may not write to the package."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "flora_dist" / "kernels"


def found() -> Found:
    """What this process steps with, by ``FLORA_DIST_KERNELS``; the library is loaded once.

    Raises:
        ValueError: the variable is none of its choices.
        RuntimeError: it insists on kernels, and there are none.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in _CHOICES:
        raise ValueError(
            f"{VARIABLE} must be torch, native or unset; got {wanted!r}. Correct it, or unset it."
        )
    if wanted == "torch":
        return Found(operators=None, name="torch", reason="")
    loaded = _loaded()
    if wanted == "native" and loaded.operators is None:
        raise RuntimeError(f"{VARIABLE}=native asks for compiled kernels: {loaded.reason}")
    return loaded


@functools.cache
def _loaded() -> Found:
    name = library_name()
    folders = [package_folder(), cache_folder()]
    path = next((each / name for each in folders if (each / name).is_file()), None)
    if path is None:
        others = [other for each in folders for other in sorted(each.glob("kernels-*.so"))]
        what = f"{others[0]} is of other sources" if others else "none are installed"
        return _without(f"{what}. Compile them once: {REMEDY}")
    try:
        ops: Any = torch.ops  # its loader has no types
        ops.load_library(str(path))
        operators = ops.flora_dist_kernels
        built_from = operators.source()
    except (OSError, RuntimeError, AttributeError) as error:
        return _without(f"{path} cannot be loaded: {error}. Compile it anew: {REMEDY}")
    if built_from != digest():
        return _without(f"{path} was compiled from other sources. Compile it anew: {REMEDY}")
    return Found(operators=operators, name=f"native ({operators.instruction_set()})", reason="")


def _without(reason: str) -> Found:
    return Found(operators=None, name="torch", reason=reason)
