# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled kernels; says why where there are none. Nothing is compiled here."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from flora_dist.kernels.compiler import digest
from flora_dist.kernels.presence import REMEDY, VARIABLE, look, wanted


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


def found() -> Found:
    """What this process steps with, by ``FLORA_DIST_KERNELS``; the library is loaded once.

    Raises:
        ValueError: the variable is none of its choices.
        RuntimeError: it insists on kernels, and there are none.
    """
    return _found_for(os.environ.get(VARIABLE, ""))


@functools.cache
def _found_for(asked: str) -> Found:
    wanted({VARIABLE: asked})
    if asked == "torch":
        return Found(operators=None, name="torch", reason="")
    loaded = _loaded()
    if asked == "native" and loaded.operators is None:
        raise RuntimeError(f"{VARIABLE}=native asks for compiled kernels: {loaded.reason}")
    return loaded


@functools.cache
def _loaded() -> Found:
    presence = look()
    path = presence.path
    if path is None:
        return _without(presence.reason)
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
