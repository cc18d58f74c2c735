# SPDX-License-Identifier: Apache-2.0
"""Sketched gradients: every layout and level is the run of ``reference.py`` on expand(compress(G)).

Tolerances are those of the battery, and for the same reasons: sums in another order, grown by ten
steps of training, with clipping and windows that change. In fp32 the batch is the battery's too, in
one micro-batch: autograd's own rounding over more of them reaches 3e-6 of the movement before any
sketch is taken; float64 shows that accumulation is right.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from tests.battery.layouts import place_of
from tests.battery.oracle import distances
from tests.battery.test_layouts import EXACT, FLOAT_MODEL, FLOAT_PARAMETER
from tests.conftest import pool_of
from tests.gradients import layouts
from tests.gradients.oracle import MANY, SketchedCase, Weights, reference_run
from tests.harness.covering import by_default

MAX_NORM = 0.118
"""Of ``MANY`` samples; some steps' gradients are above it and some below."""
SHARDED = [name for name in layouts.LAYOUTS if "ddp" not in name]
FLORA = {"momentum": "flora"}

RULES = [{"momentum": rule} for rule in ("flora", "flora_strict", "blend", "none")]
CASES: list[SketchedCase] = [
    *[SketchedCase(settings=rule, micro_batches=3, samples=MANY) for rule in RULES],
    SketchedCase(settings={**FLORA, "sketch": "gaussian"}, gradient_rank=4),
    SketchedCase(settings={**FLORA, "sketch": "rademacher", "maximize": True}, gradient_rank=1),
    SketchedCase(settings={**FLORA, "block": "full", "sketch": "gaussian"}),
    SketchedCase(settings={"momentum": "blend", "rank": None}, gradient_rank=2),
    SketchedCase(settings={"momentum": "blend"}, max_norm=MAX_NORM, micro_batches=4, samples=MANY),
]
FLOAT_CASES = [SketchedCase(dtype=torch.float32, settings=rule) for rule in RULES]
LEVELLED = [
    SketchedCase(settings=settings, level="sharded", micro_batches=3, samples=MANY)
    for settings in (FLORA, {"momentum": "blend"})
]
YOUNGER = [
    SketchedCase(settings={"momentum": "ademamix", "blend_gain": 4.0}),
    SketchedCase(settings={"momentum": "vectors", "normalise": "racs", "growth": 1.01}),
    SketchedCase(settings={"momentum": "subspace_adam", "rank": 1}),
    SketchedCase(settings={"momentum": "apollo", "growth": 1.01, "rank": 1}, gradient_rank=4),
]
"""Rules read a sketched gradient as they read a dense one: whole matrices and cut blocks do."""
TILED = SketchedCase(settings={"momentum": "blend", "orthogonalise": 4}, micro_batches=3)
KEYS = sorted({key for case in CASES for key in case.settings})


def _axes(layout: str, case: SketchedCase) -> dict[str, Hashable]:
    return {
        **place_of(layout),
        **{key: case.settings.get(key, "as it is") for key in KEYS},
        "level": case.level,
        "dtype": case.dtype,
        # How many there are changes nothing in the code, only whether there is more than one, or
        # one of its own.
        "several micro-batches": case.micro_batches > 1,
        "gradient rank of its own": case.gradient_rank is not None,
        "clipped": case.max_norm is not None,
    }


# One table for all three tests: a rule on a layout is met in one of them.
RUNS = by_default(
    [*product(layouts.LAYOUTS, [*CASES, *FLOAT_CASES]), *product(SHARDED, LEVELLED)], _axes
)
LEVELLED_RUNS = [run for run in RUNS if run.values[1].level == "sharded"]
FLOAT_RUNS = [run for run in RUNS if run.values[1].dtype == torch.float32]
EXACT_RUNS = [run for run in RUNS if run not in LEVELLED_RUNS and run not in FLOAT_RUNS]


@cache
def _expected(name: str) -> tuple[Weights, Weights, list[float]]:
    cases = {str(case): case for case in (*CASES, *FLOAT_CASES, *LEVELLED, *YOUNGER, TILED)}
    return reference_run(cases[name])


def _distances(layout: str, case: SketchedCase, fault: str = "") -> tuple[float, float, float]:
    """(whole model, worst parameter, worst norm), relative; the ranks must agree bit for bit."""
    world_size, _ = layouts.LAYOUTS[layout]
    everyone = pool_of(world_size)(layouts.run, layout, case, fault)
    weights, norms = everyone[0]
    for theirs, their_norms in everyone[1:]:
        assert fault or their_norms == norms
        for name, value in theirs.items():
            assert fault or torch.equal(value, weights[name]), f"ranks disagree on {name}"
    start, expected, expected_norms = _expected(str(case))
    pairs = zip(norms, expected_norms, strict=True)
    norm = max(abs(got - wanted) / wanted for got, wanted in pairs)
    return (*distances(start, expected, weights), norm)


@pytest.mark.parametrize(("layout", "case"), EXACT_RUNS, ids=str)
def test_compressed_gradients_equal_the_reference_in_float64(
    layout: str, case: SketchedCase
) -> None:
    _, worst, norm = _distances(layout, case)
    assert worst < EXACT
    assert norm < EXACT


@pytest.mark.parametrize(
    ("layout", "case"), [*product(("plain", "tp x2"), YOUNGER), ("plain", TILED)], ids=str
)
def test_rules_that_were_added_later_equal_the_reference_too(
    layout: str, case: SketchedCase
) -> None:
    _, worst, norm = _distances(layout, case)
    assert worst < EXACT
    assert norm < EXACT


@pytest.mark.parametrize(("layout", "case"), LEVELLED_RUNS, ids=str)
def test_gradients_sketched_after_the_reduction_equal_the_reference(
    layout: str, case: SketchedCase
) -> None:
    _, worst, norm = _distances(layout, case)
    assert worst < EXACT
    assert norm < EXACT


@pytest.mark.parametrize(("layout", "case"), FLOAT_RUNS, ids=str)
def test_compressed_gradients_equal_the_reference_in_float32(
    layout: str, case: SketchedCase
) -> None:
    whole, worst, _ = _distances(layout, case)
    assert whole < FLOAT_MODEL
    assert worst < FLOAT_PARAMETER


SEEN: list[tuple[str, str, dict[str, Any]]] = [
    ("fsdp2 x2", "divisor", {}),
    ("ddp x2", "divisor", {}),
    ("hsdp 2x2", "replicas", {}),
    ("fsdp2 x2", "micro-batches", {"micro_batches": 3, "samples": MANY}),
    ("plain", "micro-batches", {"micro_batches": 3, "samples": MANY}),
    ("plain", "fresh basis", {}),
    ("plain", "basis of its own", {}),
    ("tp x2", "cut blocks", {}),
    ("fsdp2 x tp 2x2", "cut blocks", {}),
    ("columns x2", "cut blocks", {"level": "sharded"}),
    ("fsdp2 x3", "whose line", {}),
    ("plain", "clipping", {"max_norm": MAX_NORM, "samples": MANY}),
    ("columns x2", "blocks kept twice", {}),
    ("tp x2", "blocks kept twice", {}),
]


@pytest.mark.parametrize(("layout", "fault", "options"), SEEN)
def test_a_broken_mechanism_is_seen(layout: str, fault: str, options: dict[str, Any]) -> None:
    case = SketchedCase(settings=FLORA, **options)
    expected = reference_run(case)
    everyone = pool_of(layouts.LAYOUTS[layout][0])(layouts.run, layout, case, fault)
    weights, norms = everyone[0]
    _, worst = distances(expected[0], expected[1], weights)
    norm = max(abs(a - b) / b for a, b in zip(norms, expected[2], strict=True))
    # Adafactor's normalisation hides a factor that all steps share; the norm does not.
    assert not max(worst, norm) < 1e6 * EXACT  # NaN counts as seen


@pytest.mark.parametrize("layout", ["plain", "ddp x2", "fsdp2 x3", "hsdp 2x2"])
def test_accumulation_of_the_same_data_is_the_same_run(layout: str) -> None:
    runs = []
    for number in (1, 3, 4):
        case = SketchedCase(settings=FLORA, micro_batches=number, samples=MANY)
        runs.append(pool_of(layouts.LAYOUTS[layout][0])(layouts.run, layout, case)[0][0])
    start, _, _ = _expected(str(CASES[0]))
    for other in runs[1:]:
        _, worst = distances(start, runs[0], other)
        assert worst < EXACT
