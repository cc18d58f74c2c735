# SPDX-License-Identifier: Apache-2.0
"""A step that is planned asks little: through how many files it goes, and what one matrix adds."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import flora_dist
from flora_dist import Flora
from tests.kernels.paths import path

ROOT = str(Path(flora_dist.__file__).parent)


def calls(step: Callable[[], object]) -> Counter[str]:
    """Calls of the package's functions by file, in the third of three steps."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            counted[frame.f_code.co_filename] += 1

    step()
    step()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(before)
    return counted


def stepped(layers: int, level: str = "dense") -> Callable[[], None]:
    """Backward and step of so many linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(layers)])
    optimizer = Flora(model.named_parameters(), rank=8, block=64)
    if level != "dense":
        flora_dist.attach(model, optimizer, level, gradient_rank=16)
    inputs = torch.randn(8, 64)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize(("level", "most"), [("dense", 14), ("compressed", 20)])
def test_a_step_by_kernels_goes_through_few_files(level: str, most: int) -> None:
    with path("native"):
        files = calls(stepped(2, level))
    assert 0 < len(files) <= most, sorted(files)


# Torch's operators draw the random bits of each momentum's rounding by calls of their own.
@pytest.mark.parametrize(("kernels", "most"), [("native", 20), ("torch", 34)])
def test_a_further_layer_adds_few_calls(kernels: str, most: int) -> None:
    with path(kernels):
        few, many = (calls(stepped(layers)).total() for layers in (2, 12))
    assert 0 < many - few <= 10 * most  # of a matrix and a bias each
