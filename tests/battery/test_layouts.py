# SPDX-License-Identifier: Apache-2.0
"""The promise: the same seed gives the same run on one process and on any layout.

Distances are over the parameter's movement. In float64 only the order of sums differs: 1e-15 per
step, grown by the training itself, leaves three digits to 1e-11. In fp32 at lr 1e-3 the two runs
differ by the rounding of weights of size 0.1 that move 5e-3: 2e-6 for the model, 2e-5 for the
worst single parameter (as few as one element).
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_dist.core.state.presets import RACS
from tests.battery import layouts
from tests.battery.mutations import (
    COLUMN_MUTATIONS,
    LINE_MUTATIONS,
    MUTATIONS,
    RECORD_MUTATIONS,
    RULE_MUTATIONS,
    SPAN_MUTATIONS,
    mutated,
)
from tests.battery.oracle import Case, distances, reference_run
from tests.conftest import pool_of
from tests.harness.covering import by_default

EXACT = 1e-11
FLOAT_MODEL, FLOAT_PARAMETER = 2e-6, 2e-5

SETTINGS: list[dict[str, Any]] = [
    {"momentum": "flora"},
    {"momentum": "flora", "sketch": "gaussian", "transfer": "reset"},
    {"momentum": "flora", "sketch": "rademacher", "weight_decay": 0.1},
    {"momentum": "flora", "sketch": "gaussian", "block": "full"},
    {"momentum": "flora", "rank": None},
    {"momentum": "flora", "clip": None, "beta2": 0.95},
    {"momentum": "flora_strict"},
    {"momentum": "flora_strict", "sketch": "gaussian", "scale_parameter": True},
    {"momentum": "flora_strict", "sketch": "rademacher", "block": "full"},
    {"momentum": "blend"},
    {"momentum": "blend", "transfer": "reset", "blend_gain": 4.0, "scale_parameter": True},
    {"momentum": "none"},
    {"momentum": "ademamix", "beta1": 0.99, "blend_gain": 4.0, "scale_parameter": "relative"},
    # Two numbers are kept of each: at rank 1 of 8 that is half of a row at most.
    {"momentum": "subspace_adam", "blend_gain": 2.5, "transfer": "reset", "rank": 1},
    {"momentum": "apollo", "beta2": 0.95, "rank": 1},
    {"momentum": "apollo", "sketch": "gaussian", "growth": 1.01, "rank": 1},
    {"momentum": "vectors", "normalise": "rows", "beta2": 0.95},
    {"momentum": "flora", "normalise": "columns"},
    {"momentum": "flora", "normalise": "racs", "growth": 1.01},
    {"momentum": "flora_strict", "sketch": "gaussian", "state_bits": 8},
    {"momentum": "blend", "rank": 8, "state_bits": 4, "weight_decay": 0.1},
    {"momentum": "none", "growth": 1.01},
    {"momentum": "flora_strict", "growth": 1.0},
]
SIDE = {"orthogonalise": 2}
# Of what each rank of these layouts holds whole tiles; the last ones of the experts are smaller.
TILED = Case(settings={"momentum": "blend", "roles": {"square.*": SIDE, "expert*": SIDE}})
OF_WHOLE_TILES = ("fsdp2 x3", "columns x2", "fsdp2 x tp 2x2")
ON_ONE_PROCESS = [
    TILED,
    Case(settings={"momentum": "flora_strict", "orthogonalise": 4}),
    # Of rank 1 there is one second moment in a block, which no mean changes.
    Case(settings={"momentum": "subspace_adam", "rank": 2, "block": 16}),
]
EXACT_CASES = [Case(settings=settings) for settings in SETTINGS]
FLOAT_CASES = [
    Case(dtype=torch.float32, settings={"momentum": momentum})
    for momentum in ("flora", "flora_strict", "blend", "none")
]
FLOAT_CASES.append(Case(dtype=torch.float32, settings={"momentum": "subspace_adam", "rank": 1}))
FLOAT_RECORDS = Case(
    dtype=torch.float32, settings={"momentum": "flora", "rank": 4, "state_bits": 4}
)
# Without a clip one message is enough where columns are sharded, between blocks.
UNCLIPPED = [
    Case(dtype=torch.float32, settings={"momentum": momentum, "clip": None})
    for momentum in ("none", "blend", "flora")
]
KEYS = sorted({key for settings in SETTINGS for key in settings})


def _axes(layout: str, case: Case) -> dict[str, Hashable]:
    place = layouts.place_of(layout)
    if place["ranks"] == 1:
        return place  # nothing is cut: the settings are those of the tests on one process
    settings = {key: case.settings.get(key, "as it is") for key in KEYS}
    return {**place, **settings, "dtype": case.dtype}


# One table for both precisions: a rule on a layout is met in either.
RUNS = by_default(product(layouts.LAYOUTS, [*EXACT_CASES, *FLOAT_CASES]), _axes)
EXACT_RUNS, FLOAT_RUNS = (
    [run for run in RUNS if run.values[1].dtype == dtype]
    for dtype in (torch.float64, torch.float32)
)


@cache
def _expected(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    others = (*FLOAT_CASES, FLOAT_RECORDS, *UNCLIPPED, *ON_ONE_PROCESS)
    cases = {str(case): case for case in (*EXACT_CASES, *others)}
    return reference_run(cases[name])


def _distances(layout: str, case: Case, mutation: str = "") -> tuple[float, float]:
    world_size, _ = layouts.LAYOUTS[layout]
    everyone = pool_of(world_size)(layouts.run, layout, case, mutation)
    for weights in everyone[1:]:
        for name, value in weights.items():
            same = mutation or torch.equal(value, everyone[0][name])
            assert same, f"ranks disagree on {name}"
    return distances(*_expected(str(case)), everyone[0])


@pytest.mark.parametrize(("layout", "case"), EXACT_RUNS, ids=str)
def test_a_layout_equals_the_reference_in_float64(layout: str, case: Case) -> None:
    _, worst = _distances(layout, case)
    assert worst < EXACT


@pytest.mark.parametrize(("layout", "case"), FLOAT_RUNS, ids=str)
def test_a_layout_equals_the_reference_in_float32(layout: str, case: Case) -> None:
    whole, worst = _distances(layout, case)
    assert whole < FLOAT_MODEL
    assert worst < FLOAT_PARAMETER


@pytest.mark.parametrize("layout", ["flat x3", "columns x2"])
def test_a_momentum_in_few_bits_is_the_references_in_float32(layout: str) -> None:
    """The compiled kernels' records, of cut blocks too; no number here lies near an edge."""
    whole, worst = _distances(layout, FLOAT_RECORDS)
    assert whole < FLOAT_MODEL
    assert worst < FLOAT_PARAMETER


@pytest.mark.parametrize("case", UNCLIPPED, ids=str)
def test_sharded_columns_without_a_clip_equal_the_reference_in_float32(case: Case) -> None:
    whole, worst = _distances("columns x2", case)
    assert whole < FLOAT_MODEL
    assert worst < FLOAT_PARAMETER


@pytest.mark.parametrize("layout", OF_WHOLE_TILES)
def test_tiles_that_ranks_hold_whole_are_orthogonalised_as_in_the_reference(layout: str) -> None:
    _, worst = _distances(layout, TILED)
    assert worst < EXACT


def _refusal(layout: str, case: Case) -> str:
    with pytest.raises(ValueError, match="orthogonalise") as raised:
        layouts.run(layout, case)
    return str(raised.value)


@pytest.mark.parametrize("layout", ["fsdp2 x2", "tp x2", "flat x2", "fsdp1 x2"])
def test_tiles_that_a_layout_cuts_are_refused_on_every_rank(layout: str) -> None:
    case = Case(settings={"orthogonalise": 4})
    for said in pool_of(2)(_refusal, layout, case):
        assert "needs whole tiles of 4 rows and columns on a rank" in said


@pytest.mark.parametrize("case", [*EXACT_CASES, *ON_ONE_PROCESS], ids=str)
def test_one_process_equals_the_reference_in_float64(case: Case) -> None:
    _, worst = distances(*_expected(str(case)), layouts.on_plain(case))
    assert worst < EXACT


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_one_process_equals_the_reference_in_float32(case: Case) -> None:
    whole, worst = distances(*_expected(str(case)), layouts.on_plain(case))
    assert whole < FLOAT_MODEL
    assert worst < FLOAT_PARAMETER


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend"])
@pytest.mark.parametrize("mutation", [*MUTATIONS, *SPAN_MUTATIONS])
def test_the_battery_sees_a_broken_mechanism(mutation: str, momentum: str) -> None:
    _, worst = _distances("flat x3", Case(settings={"momentum": momentum}), mutation)
    assert not worst < 1e6 * EXACT  # NaN counts as seen


@pytest.mark.parametrize("mutation", LINE_MUTATIONS)
def test_the_battery_sees_rows_that_travel_wrong(mutation: str) -> None:
    layout = "flat x2" if mutation == "rows of two spans" else "flat x3"
    _, worst = _distances(layout, Case(settings={"momentum": "flora"}), mutation)
    assert not worst < 1e6 * EXACT


@pytest.mark.parametrize("mutation", RECORD_MUTATIONS)
def test_the_battery_sees_momenta_in_few_bits_that_are_broken(mutation: str) -> None:
    (case,) = [case for case in EXACT_CASES if case.settings.get("state_bits") == 4]
    expected = _expected(str(case))
    with mutated(mutation):
        _, worst = distances(*expected, layouts.on_plain(case))
    assert not worst < 1e6 * EXACT


@pytest.mark.parametrize("rule", RULE_MUTATIONS)
def test_the_battery_sees_a_rule_that_lost_what_makes_it_one(rule: str) -> None:
    case = next(case for case in [*ON_ONE_PROCESS, *EXACT_CASES] if _is_of(rule, case.settings))
    with mutated(rule):
        _, worst = distances(*_expected(str(case)), layouts.on_plain(case))
    assert not worst < 1e6 * EXACT


def _is_of(rule: str, settings: dict[str, Any]) -> bool:
    by_setting = {"normalise": "columns", "growth": 1.01, "orthogonalise": 4}
    if rule == "racs":
        return bool(settings.get("normalise") == rule)
    if rule in by_setting:
        return bool(settings.get(rule) == by_setting[rule])
    return bool(settings["momentum"] == rule)


def test_the_battery_sees_norms_that_are_not_summed_for_growth() -> None:
    case = Case(settings={"momentum": "none", "growth": 1.01})
    _, worst = _distances("flat x3", case, "rms sums")
    assert not worst < 1e6 * EXACT


@pytest.mark.parametrize("layout", ["flat x3", "fsdp2 x2"])
def test_the_battery_sees_what_rows_weigh_that_is_not_summed(layout: str) -> None:
    (case,) = [case for case in EXACT_CASES if _is_of("racs", case.settings)]
    _, worst = _distances(layout, case, "what rows weigh")
    assert not worst < 1e6 * EXACT


@pytest.mark.parametrize("mutation", ["rms sums", "blocks of spans"])
def test_the_battery_sees_a_scaled_gradient_whose_norm_or_sketch_is_not_summed(
    mutation: str,
) -> None:
    case = Case(settings={"momentum": "apollo", "beta2": 0.95, "rank": 1})
    _, worst = _distances("flat x3", case, mutation)
    assert not worst < 1e6 * EXACT


@pytest.mark.parametrize("mutation", ["column sums", "rms sums", "window change", "keys"])
def test_the_battery_sees_a_broken_mechanism_on_rows(mutation: str) -> None:
    _, worst = _distances("fsdp2 x2", Case(settings={"momentum": "flora"}), mutation)
    assert not worst < 1e6 * EXACT


@pytest.mark.parametrize("mutation", [*MUTATIONS, *COLUMN_MUTATIONS])
@pytest.mark.parametrize("layout", ["columns x2", "tp x2"])
def test_the_battery_sees_a_broken_mechanism_on_columns(layout: str, mutation: str) -> None:
    _, worst = _distances(layout, Case(settings={"momentum": "flora"}), mutation)
    assert not worst < 1e6 * EXACT


@pytest.mark.parametrize(
    ("layout", "momentum", "messages"),
    [
        ("fsdp2 x3", "flora", 1),
        ("fsdp2 x3", "blend", 1),
        ("fsdp2 x3", "none", 1),
        ("fsdp2 x3", "racs", 1),
        ("fsdp2 x3", "flora_strict", 2),
        ("fsdp2 x3", "apollo", 2),
        ("hsdp 2x2", "flora", 1),
        ("columns x3", "flora", 2),
        ("columns x3", "racs", 2),
        ("columns x3", "flora_strict", 3),
        ("tp x2", "flora", 2),
        # one for what the data axis alone shards, two for what both do
        ("fsdp2 x tp 2x2", "flora", 3),
        ("ddp x2", "flora", 0),
        # after an exchange of cut rows between those who share them
        ("flat x3", "flora", 2),
        ("flat x3", "flora_strict", 3),
        ("flat x3", "blend", 2),
        ("flat x3", "none", 2),
        ("flat x3", "racs", 2),
        # of two ranks both share each cut: nothing beside the sums
        ("flat x2", "flora", 1),
        ("flat x2", "flora_strict", 2),
        ("flat x2", "blend", 1),
        ("flat x2", "none", 1),
    ],
)
def test_the_number_of_messages_is_fixed(layout: str, momentum: str, messages: int) -> None:
    world_size, _ = layouts.LAYOUTS[layout]
    case = Case(settings=dict(RACS) if momentum == "racs" else {"momentum": momentum})
    assert set(pool_of(world_size)(layouts.count_messages, layout, case)) == {messages}
