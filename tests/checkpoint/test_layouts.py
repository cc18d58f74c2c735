# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any layout goes on on any other: saved after five of ten steps, inside a window.

The same layout goes on bit for bit; another one as ``reference.py`` does, to the tolerances of
``tests/battery/test_layouts.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.battery.layouts import place_of
from tests.battery.oracle import Case, distances, reference_run
from tests.battery.test_layouts import EXACT, FLOAT_MODEL, FLOAT_PARAMETER
from tests.battery.variants import differing
from tests.checkpoint.layouts import LAYOUTS, on_ranks, resume, save_half_way
from tests.harness.covering import by_default

# fp32, which ZeRO has too; dense moments decay, blocks are cut, windows change.
SINGLE = Case(dtype=torch.float32, settings={"weight_decay": 0.1})
DOUBLE = Case(settings={"momentum": "flora_strict", "weight_decay": 0.1, "state_bits": 8})
# Low precision: rounded with bits that hang on the step.
LOW = Case(dtype=torch.bfloat16, settings={"state_dtype": "bfloat16"})
NAMES = list(LAYOUTS)
RING = list(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
"""Each layout to the next: what every run of the tests sees of the whole square."""
SQUARE = [(a, b) for a in NAMES for b in NAMES if a != b and (a, b) not in RING]


def _axes(layout: str, case_name: str) -> dict[str, Hashable]:
    return {**place_of(layout), "case": case_name}


# ZeRO in bf16: tests/zero/test_checkpoint.py.
UNDER_TORCH = [name for name in NAMES if "zero" not in name]
SAME = by_default([*product(NAMES, ["fp32"]), *product(UNDER_TORCH, ["bf16"])], _axes)

Everything = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and end of a layout's own run, made once."""

    @cache
    def of(layout: str, case_name: str) -> tuple[Path, Everything]:
        folder = tmp_path_factory.mktemp("saved") / layout.replace(" ", "-")
        return folder, on_ranks(layout, save_half_way, CASES[case_name], folder)

    return of


CASES = {"fp32": SINGLE, "fp64": DOUBLE, "bf16": LOW}


@pytest.mark.parametrize(("layout", "case_name"), SAME)
def test_the_same_layout_goes_on_bit_for_bit(layout: str, case_name: str, saved: Any) -> None:
    folder, ends = saved(layout, case_name)
    for mine, theirs in zip(on_ranks(layout, resume, CASES[case_name], folder), ends, strict=True):
        assert differing(mine, theirs) == []


@cache
def _reference(case_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return reference_run(CASES[case_name])


def _check_other(source: str, target: str, case_name: str, saved: Any) -> tuple[float, float]:
    folder, _ = saved(source, case_name)
    start, expected = _reference(case_name)
    for end in on_ranks(target, resume, CASES[case_name], folder):
        whole, worst = distances(start, expected, {n: end[n] for n in expected})
        if case_name == "fp64":
            assert worst <= EXACT
        else:
            assert whole <= FLOAT_MODEL
            assert worst <= FLOAT_PARAMETER
    return whole, worst


@pytest.mark.parametrize(("source", "target"), RING)
def test_another_layout_goes_on_as_the_reference(source: str, target: str, saved: Any) -> None:
    _check_other(source, target, "fp32", saved)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), SQUARE)
def test_every_layout_goes_on_on_every_other(source: str, target: str, saved: Any) -> None:
    _check_other(source, target, "fp32", saved)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("fsdp2 x tp 2x2", "plain"),
        ("fsdp2 x3", "fsdp2 x tp 2x2"),
        ("fsdp2 x tp 2x2", "fsdp1 x2"),
        ("fsdp1 x2", "fsdp2 x tp 2x2"),
    ],
)
def test_cut_blocks_come_together_exactly(source: str, target: str, saved: Any) -> None:
    _check_other(source, target, "fp64", saved)
