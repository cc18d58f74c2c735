# SPDX-License-Identifier: Apache-2.0
"""Ranks of engines compare when they attach, and after every so many whole steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from flora_dist.core.consistency import compare as consistency
from tests.conftest import launched_pool_of
from tests.zero.small import PARAMS, STAGES, build, config_of, start, states, train

pytestmark = pytest.mark.deepspeed
# Sub-groups of one parameter each under stage 3: steps come in more turns than there are groups.
SMALL = {3: {"sub_group_size": 100}}
EVERY = 2


def _start(stage: int, **params: Any) -> Any:
    """Two groups, so that stages 1 and 2 step in turns."""
    model = build()
    groups = [
        {"params": list(layer.named_parameters(prefix=name)), "lr": lr}
        for name, layer, lr in (("up", model.up, 1e-2), ("down", model.down, 2e-2))
    ]
    config = config_of(
        stage,
        optimizer={"type": "Flora", "params": {**PARAMS, "check_every": EVERY, **params}},
        zero_optimization={"stage": stage, **SMALL.get(stage, {})},
    )
    return start(config, model=model, model_parameters=groups)


def _count(stage: int) -> tuple[int, int]:
    """Comparisons at attaching, and in six steps after it."""
    calls = []
    original = consistency.check

    def spy(*arguments: Any, **more: Any) -> None:
        calls.append(arguments)
        original(*arguments, **more)

    consistency.check = spy
    try:
        engine, _ = _start(stage)
        attaching = len(calls)
        train(engine, range(6))
    finally:
        consistency.check = original
    engine.destroy()
    return attaching, len(calls) - attaching


@pytest.mark.parametrize("stage", STAGES)
def test_equal_ranks_pass_once_for_each_so_many_whole_steps(stage: int) -> None:
    assert launched_pool_of(2)(_count, stage) == [(1, 6 // EVERY)] * 2


def _seeds(stage: int) -> str:
    try:
        _start(stage, seed=dist.get_rank())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", STAGES)
def test_other_seeds_are_refused_when_the_engine_is_built(stage: int) -> None:
    for text in launched_pool_of(2)(_seeds, stage):
        assert "the same seed; seed of" in text
        assert "is 1 on rank 1 and 0 on rank 0" in text


def _planted(stage: int, what: str) -> tuple[int, str]:
    engine, flora = _start(stage)
    train(engine, range(3))
    if dist.get_rank() == 1:
        for name, own in states(flora):
            if what == "step":
                own["step"] += 1
            elif what == "column" and "column" in own and own["column"].numel():
                own["column"].view(-1)[0] *= 2
            del name
    try:
        train(engine, range(3, 4))
    except ValueError as error:
        return 4, str(error)
    return -1, ""


@pytest.mark.parametrize("what", ["step", "column"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_that_has_drifted_is_named_on_every_rank(stage: int, what: str) -> None:
    for step, text in launched_pool_of(2)(_planted, stage, what):
        assert step == 4
        field = {"step": "steps", "column": "statistics"}[what]
        assert f"the same {field}; {what} of" in text
        assert "on rank 1" in text
