# SPDX-License-Identifier: Apache-2.0
"""ZeRO 0 to 3: training on an engine is the run of ``reference.py``.

fp32, where the model's own weights are ZeRO's masters. Tolerances are three times those of the
battery: gradients are summed over micro-batches and ranks, and scaled by a norm that is summed in
another order, so they differ by rounding before Flora sees them. Parameters without any gradient
must keep every bit.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from itertools import product
from typing import Any

import pytest

from tests.battery.mutations import MUTATIONS
from tests.battery.test_layouts import FLOAT_MODEL, FLOAT_PARAMETER
from tests.conftest import launched_pool_of
from tests.harness.covering import by_default
from tests.zero import engines, faults
from tests.zero.engines import MAX_NORM, Run, Weights
from tests.zero.expected import distances_that_move, follow

pytestmark = pytest.mark.deepspeed

MODEL, PARAMETER = 3 * FLOAT_MODEL, 3 * FLOAT_PARAMETER
SEEN = 10 * PARAMETER
"""A fault must be that far off."""
STAGES = (0, 1, 2, 3)
RULES = ("flora", "flora_strict", "blend", "none")


@cache
def _expected(
    momentum: str, groups: bool, keeps_gradients: bool, stale: bool, max_norm: float
) -> tuple[Weights, Weights, list[float]]:
    stage = 3 if keeps_gradients else 0
    run = Run(stage=stage, settings={"momentum": momentum}, groups=groups, stale=stale)
    return follow(run, max_norm)


def _expected_of(run: Run, max_norm: float) -> tuple[Weights, Weights, list[float]]:
    options = (run.groups, run.keeps_gradients, run.stale)
    return _expected(run.settings["momentum"], *options, max_norm)


def _train(world_size: int, run: Run) -> dict[str, Any]:
    """The first rank's result; all ranks must have the same weights."""
    first, *others = launched_pool_of(world_size)(engines.train, run)
    for other in others:
        differing = [n for n, w in first["weights"].items() if not w.equal(other["weights"][n])]
        assert run.mutation or not differing, differing
    return dict(first)


def _distances(run: Run, result: dict[str, Any], max_norm: float = MAX_NORM) -> tuple[float, float]:
    start, expected, norms = _expected_of(run, max_norm)
    if run.stage > 0 and not run.mutation:  # DeepSpeed keeps no norm at stage 0 in fp32
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
    return distances_that_move(start, expected, result["weights"])


def _check(world_size: int, run: Run) -> dict[str, Any]:
    result = _train(world_size, run)
    whole, worst = _distances(run, result)
    assert whole < MODEL
    assert worst < PARAMETER
    return result


def _axes(world_size: int, stage: int, momentum: str) -> dict[str, Hashable]:
    return {"world size": world_size, "stage": stage, "momentum": momentum}


@pytest.mark.parametrize(
    ("world_size", "stage", "momentum"), by_default(product((2, 3, 1), STAGES, RULES), _axes)
)
def test_an_engine_equals_the_reference(world_size: int, stage: int, momentum: str) -> None:
    result = _check(world_size, Run(stage=stage, settings={"momentum": momentum}))
    assert set.union(*result["counts"].values()) == {(10, 3)}


FLORA = {"momentum": "flora"}
STRICT = {"momentum": "flora_strict"}
SMALL = {"sub_group_size": 300}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OVERLAYS: list[tuple[int, Run]] = [
    *[(3, Run(stage=stage, settings=FLORA, groups=True)) for stage in STAGES],
    *[(2, Run(stage=s, settings=STRICT, zero=OFFLOAD, groups=True)) for s in (1, 2, 3)],
    *[(3, Run(stage=s, settings=FLORA, zero={"round_robin_gradients": True})) for s in (1, 2)],
    (2, Run(stage=2, settings=FLORA, zero={"round_robin_gradients": True, "overlap_comm": True})),
    *[(2, Run(stage=s, settings=FLORA, zero={"overlap_comm": True})) for s in (1, 3)],
    *[(2, Run(stage=s, settings=FLORA, zero={"contiguous_gradients": False})) for s in (2, 3)],
    *[(2, Run(stage=s, settings=FLORA, zero={"reduce_scatter": False})) for s in (2, 3)],
    (3, Run(stage=3, settings=STRICT, zero=SMALL, groups=True)),
    (2, Run(stage=3, settings=FLORA, zero={**OFFLOAD, **SMALL})),
    (2, Run(stage=3, settings=FLORA, zero={**OFFLOAD, "offload_param": {"device": "cpu"}})),
    (2, Run(stage=3, settings=FLORA, zero_init=True)),
    (3, Run(stage=3, settings=STRICT, zero_init=True, zero=SMALL)),
    # The threshold's default keeps all of these small parameters whole.
    (2, Run(stage=3, settings=FLORA, zero={"stage3_param_persistence_threshold": 0})),
    (3, Run(stage=3, settings=STRICT, zero={"stage3_param_persistence_threshold": 0}, groups=True)),
]


@pytest.mark.parametrize(("world_size", "run"), OVERLAYS, ids=str)
def test_an_option_of_deepspeed_changes_nothing(world_size: int, run: Run) -> None:
    _check(world_size, run)


@pytest.mark.parametrize("world_size", [1, 2])
def test_zero_3_repeats_the_last_gradient_of_what_leaves_the_loss(world_size: int) -> None:
    _check(world_size, Run(stage=3, settings=FLORA, stale=True))


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_of_the_same_data_is_the_same_run(stage: int) -> None:
    runs = [Run(stage=stage, settings=FLORA, accumulation=number) for number in (1, 4)]
    once, often = (_check(2, run)["weights"] for run in runs)
    start, _, _ = _expected_of(runs[0], MAX_NORM)
    whole, worst = distances_that_move(start, once, often)
    assert whole < MODEL
    assert worst < PARAMETER


@pytest.mark.parametrize(("stage", "groups"), [(1, True), (2, True), (3, False)])
def test_rows_are_cut_twice_and_blocks_are_cut(stage: int, groups: bool) -> None:
    # Else the runs above would prove less than they say.
    cuts = launched_pool_of(3)(engines.cuts_of, Run(stage=stage, groups=groups))[0]
    assert cuts["single.weight"][0] == 2
    assert sum(blocks > 0 for _, blocks in cuts.values()) > 1


# Engines step by kernels, which find blocks of spans themselves: tests.kernels.mutations.
@pytest.mark.parametrize("mutation", [*MUTATIONS, "rows of spans"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_broken_mechanism_is_seen(stage: int, mutation: str) -> None:
    run = Run(stage=stage, settings=FLORA, mutation=mutation)
    _, worst = _distances(run, _train(3, run))
    assert not worst < SEEN  # NaN counts as seen


@pytest.mark.parametrize("stage", STAGES)
def test_missing_clipping_is_seen(stage: int) -> None:
    # Adafactor's normalisation hides a factor that is equal at all steps; this one is not.
    run = Run(stage=stage, settings=FLORA, config={"gradient_clipping": 0.0})
    _, worst = _distances(run, _train(1, run))
    assert worst > SEEN


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_wrong_map_is_refused_on_every_rank(fault: str) -> None:
    stage = 2 if "line" in fault or "round robin" in fault else 3
    for message in launched_pool_of(3)(faults.attach_with, stage, fault):
        assert message.startswith("the spans of all ranks must tile every parameter")
        assert "DeepSpeed 0." in message


@pytest.mark.parametrize("stage", [2, 3])
def test_the_right_map_is_not_refused(stage: int) -> None:
    assert launched_pool_of(3)(faults.attach_with, stage, "") == [""] * 3
