# SPDX-License-Identifier: Apache-2.0
"""ZeRO 0 to 3 with sketched gradients: the run of ``reference.py`` on expand(compress(mean G)).

fp32. Tolerances are those of ``test_equals_reference.py``, three times the battery's, for the same
reason: sums over micro-batches and ranks in another order, here of sketches. DeepSpeed clips by
sqrt(sum |C|^2 + |dense G|^2), which is above the largest norm at some steps and below at others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.conftest import launched_pool_of
from tests.zero import engines, sketched_faults
from tests.zero.engines import Run, Weights
from tests.zero.expected import distances_that_move
from tests.zero.sketched import COMPRESSED, FUSED, follow
from tests.zero.test_equals_reference import MODEL, PARAMETER, RULES, SEEN, STAGES

pytestmark = pytest.mark.deepspeed

NORM = 1e-4
"""Relative; gradients of another run's weights, which are 1e-5 off."""


def _run(stage: int, momentum: str = "flora", **more: Any) -> Run:
    return Run(stage=stage, settings={"momentum": momentum}, **{"config": COMPRESSED, **more})


@cache
def _followed(momentum: str, rank: int | None, *options: bool) -> tuple[Any, ...]:
    groups, keeps_gradients, stale = options
    config = {"flora": {} if rank is None else {"gradient_rank": rank}}
    stage = 3 if keeps_gradients else 0
    return follow(_run(stage, momentum, config=config, groups=groups, stale=stale))


def _expected(run: Run) -> tuple[Weights, Weights, list[float]]:
    rank = run.config["flora"].get("gradient_rank")
    options = (run.groups, run.keeps_gradients, run.stale)
    start, weights, norms = _followed(run.settings["momentum"], rank, *options)
    return start, weights, norms


def _train(world_size: int, run: Run) -> dict[str, Any]:
    """The first rank's result; all ranks must have the same weights and norms."""
    first, *others = launched_pool_of(world_size)(engines.train, run)
    for other in others:
        differing = [n for n, w in first["weights"].items() if not w.equal(other["weights"][n])]
        assert not differing, differing
        assert other["norms"] == first["norms"]
    return dict(first)


def _check(world_size: int, run: Run) -> None:
    result = _train(world_size, run)
    start, expected, norms = _expected(run)
    if run.stage > 0:  # DeepSpeed keeps no norm at stage 0 in fp32
        assert result["norms"] == pytest.approx(norms, rel=NORM)
    whole, worst = distances_that_move(start, expected, result["weights"])
    assert whole < MODEL
    assert worst < PARAMETER


# Every rule on every stage and every number of ranks, not every three of them.
SPREAD = [(w, _run(s, RULES[(w + s) % 4])) for w in (1, 2, 3) for s in STAGES]


@pytest.mark.parametrize(("world_size", "run"), SPREAD, ids=str)
def test_an_engine_equals_the_reference(world_size: int, run: Run) -> None:
    _check(world_size, run)


SMALL = {"sub_group_size": 300}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ROBIN = {"round_robin_gradients": True}
OVERLAYS: list[tuple[int, Run]] = [
    *[(3, _run(stage, groups=True)) for stage in (1, 2, 3)],
    (2, _run(2, "flora_strict", zero=OFFLOAD, groups=True)),
    (3, _run(1, "blend", zero=ROBIN)),
    (2, _run(2, zero={**ROBIN, "overlap_comm": True})),
    (2, _run(3, zero={"overlap_comm": True})),
    (2, _run(2, zero={"contiguous_gradients": False})),
    (2, _run(3, zero={"reduce_scatter": False})),
    # Every parameter is larger than a bucket.
    *[(2, _run(s, zero={"reduce_bucket_size": 8})) for s in (2, 3)],
    (2, _run(3, zero={**OFFLOAD, **SMALL, "offload_param": {"device": "cpu"}})),
    # The threshold's default keeps all of these small parameters whole.
    (3, _run(3, "blend", zero_init=True, zero={"stage3_param_persistence_threshold": 0, **SMALL})),
    # A matrix that leaves the loss is skipped; its bias keeps its last gradient.
    (2, _run(3, stale=True)),
    (2, _run(2, config={"flora": {"gradients": "compressed", "gradient_rank": 4}})),
    (2, _run(2, config={**COMPRESSED, "prescale_gradients": True}, zero={"reduce_scatter": False})),
]


@pytest.mark.parametrize(("world_size", "run"), OVERLAYS, ids=str)
def test_an_option_of_deepspeed_changes_nothing(world_size: int, run: Run) -> None:
    _check(world_size, run)


@pytest.mark.parametrize(("stage", "accumulation"), [(1, 4), (2, 1), (2, 4), (3, 4)])
def test_accumulation_of_the_same_data_is_the_same_run(stage: int, accumulation: int) -> None:
    _check(2, _run(stage, accumulation=accumulation))  # the runs above: 3


@pytest.mark.parametrize(("world_size", "stage"), [(1, 2), (2, 0), (3, 2), (3, 3)])
def test_a_gradient_that_is_never_formed_is_the_same_run(world_size: int, stage: int) -> None:
    _check(world_size, _run(stage, config=FUSED))


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        (0, "micro-batches"),
        *[(2, fault) for fault in ("divisor", "blocks kept twice", "norm", "scale")],
        *[(3, fault) for fault in ("whose line", "norm", "scale", "scaled once")],
    ],
)
def test_a_broken_mechanism_is_seen(stage: int, fault: str) -> None:
    run = _run(stage, groups=True)  # a sub-group or group is not all there is
    result = launched_pool_of(3)(sketched_faults.train, run, fault)[0]
    start, expected, norms = _expected(run)
    _, worst = distances_that_move(start, expected, result["weights"])
    # Adafactor's normalisation hides a factor that all steps share; the norm does not.
    pairs = zip(result["norms"], norms, strict=True)
    norm = 0.0 if stage == 0 else max(abs(a / b - 1.0) for a, b in pairs)
    assert not (worst < SEEN and norm < 10 * NORM)  # NaN counts as seen


@pytest.mark.parametrize(("world_size", "stage"), [(2, 2), (3, 3)])
def test_sketches_sent_in_bfloat16_are_close(world_size: int, stage: int) -> None:
    flora = {"gradients": "compressed", "wire_dtype": "bfloat16"}
    run = _run(stage, config={"flora": flora})
    result = _train(world_size, run)
    start, expected, norms = _expected(run)
    whole, _ = distances_that_move(start, expected, result["weights"])
    # Numbers are rounded by at most 2^-9 when they are sent and again when they are summed. Signs
    # are random: the norm is closer than its parts.
    assert 1e-4 < whole < 4e-3
    assert result["norms"] == pytest.approx(norms, rel=1e-3)
