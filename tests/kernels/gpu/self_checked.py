# SPDX-License-Identifier: Apache-2.0
"""What the kernels' self-check says of kernels that are right, wrong, and that do not run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from flora_dist import Flora
from flora_dist.kernels.gpu import choice, inputs, self_check, sketches
from flora_dist.kernels.gpu import sketched as gpu_sketched
from flora_dist.kernels.gpu.choice import VARIABLE, gpu_phases_of

SHAPE = (20, 70)
RIGHT = [
    ("blend", SHAPE, torch.float32),
    ("flora", (2, 9, 64), torch.bfloat16),
    ("apollo", SHAPE, torch.float32),
    ("blend", (30,), torch.float16),
]
# The kernel that is the first to show it, by the place of a scalar that is wrong by a hundredth:
# the rate of the second moment, and lr.
WRONG = {1: "measure (row)", 2: "finish (weight)"}


def taken(momentum: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> str:
    """Which phases step such a parameter where kernels are asked for, and what was warned of."""
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
    optimizer = Flora([("w", weight)], momentum=momentum, rank=8, block=64)
    found: list[Any] = []

    def asked(batch: Any, gradient: Any) -> Any:
        found.append(gpu_phases_of(batch, gradient))
        return found[-1] or self_check._by_torch(batch, gradient)

    weight.grad = torch.ones_like(weight)
    optimizer.roster._phases_of = asked
    asks = mock.patch.dict(os.environ, {VARIABLE: "triton"})
    with asks, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        optimizer.step()
    return ": ".join([type(found[0]).__name__, *_ours(warned)])


@contextmanager
def wrong(place: int) -> Iterator[None]:
    """Kernels that are given a wrong scalar; nothing is known of them yet."""
    right: Any = inputs.Inputs._scalars

    def scalars(self: inputs.Inputs, now: Any) -> list[float]:
        numbers = right(self, now)
        numbers[place] *= 0.99
        return list(numbers)

    with mock.patch.object(inputs.Inputs, "_scalars", scalars):
        yield


def verdict(device: str) -> dict[str, Any]:
    """All of it."""
    self_check._fault.cache_clear()
    right = [taken(*each, device) for each in RIGHT]
    broken = {}
    for place, kernel in WRONG.items():
        self_check._fault.cache_clear()
        with wrong(place):
            broken[kernel] = taken("blend", SHAPE, torch.float32, device)
    self_check._fault.cache_clear()
    with mock.patch.object(choice, "make_phases", side_effect=OSError("no C compiler")):
        failing = taken("blend", SHAPE, torch.float32, device)
    self_check._fault.cache_clear()
    return {
        "right": right,
        "wrong": broken,
        "failing": failing,
        "sketched": sketched(device, 1.0),
        "sketched wrongly": sketched(device, 0.99),
    }


def sketched(device: str, factor: float) -> str:
    """What is said of a kernel that multiplies by a scale that is wrong by this factor."""
    right = sketches.add_sketch_

    def add(c: torch.Tensor, x: torch.Tensor, unit: torch.Tensor, *, scale: float) -> None:
        right(c, x, unit, scale=factor * scale)

    kernel = mock.patch.object(sketches, "add_sketch_", add)
    with kernel, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gpu_sketched.fault.cache_clear()
        gpu_sketched.fault(torch.bfloat16, 8, 16, torch.device(device))
    gpu_sketched.fault.cache_clear()
    return "; ".join(_ours(warned))


def _ours(warned: list[warnings.WarningMessage]) -> list[str]:
    """Without those that Triton's interpreter draws from NumPy, by its version."""
    said = (str(each.message) for each in warned)
    return [text for text in said if "Triton kernel" in text]
