# SPDX-License-Identifier: Apache-2.0
"""With sketched gradients ZeRO holds sketches: none of DeepSpeed's buffers has room for more.

That such engines step as ``reference.py`` does is tested in ``test_sketched.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from flora_dist.frameworks.deepspeed import gradients
from tests.bench.zero_memory import COLUMNS, PAIRS, ROWS, held
from tests.conftest import launched_pool_of
from tests.zero.small import config_of, start, train, weights

pytestmark = pytest.mark.deepspeed

STAGES = (1, 2, 3)
DENSE = 2 * PAIRS * ROWS * COLUMNS * 4
"""Bytes of all gradients."""
LARGEST = ROWS * COLUMNS * 4
RANKS = 2


@pytest.mark.parametrize("stage", STAGES)
def test_between_backwards_and_in_the_step_an_eighth_of_dense_gradients_is_not_held(
    stage: int,
) -> None:
    # Sketches of a sixteenth, and A; nothing of DeepSpeed's grows with what is sketched.
    for between, in_backward, in_step in launched_pool_of(RANKS)(held, stage, "compressed"):
        assert between <= DENSE / 8
        # The gradient that comes, its sketch's parts and activations besides.
        assert in_backward <= DENSE / 8 + 2 * LARGEST
        # Weights of stages 1 and 2 are gathered, a part at a time; the step works on a matrix.
        assert in_step <= DENSE / 8 + 4 * LARGEST


def full(stage: int) -> tuple[int, int, int]:
    """As ``held``, with DeepSpeed's own buffers."""
    own = gradients.make_lean
    gradients.make_lean = lambda *_, **__: None  # type: ignore[assignment]
    try:
        return held(stage, "compressed")
    finally:
        gradients.make_lean = own


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_of_deepspeeds_own_are_noticed(stage: int) -> None:
    between, _, in_step = launched_pool_of(RANKS)(full, stage)[0]
    assert max(between, in_step) > DENSE / 8 + 4 * LARGEST


def without(stage: int, name: str) -> str:
    """What an engine says whose step goes past a function."""
    config = config_of(stage, flora={"gradients": "compressed"})
    engine, _ = start(config)
    optimizer: Any = engine.optimizer
    delattr(optimizer, name)  # the class's own from here on
    try:
        train(engine, range(1))
    except (AssertionError, RuntimeError) as error:  # where sizes differ DeepSpeed asserts
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize(
    ("stage", "name"),
    [(2, "_get_preflattened_grad_partition"), (3, "_prepare_fp32_grad_for_sub_group")],
)
def test_a_step_that_takes_gradients_in_another_way_is_an_error(stage: int, name: str) -> None:
    for said in launched_pool_of(RANKS)(without, stage, name):
        assert said


def mixed(stage: int) -> dict[str, bool]:
    """Which weights move where some gradients are dense, and what is left of them afterwards."""
    engine, flora = start(config_of(stage, flora={"gradients": "compressed"}))
    first = weights(engine)
    train(engine, range(2))
    last = weights(engine)
    left = [slot.part.apart for slot in flora.slots() if slot.part.apart]  # type: ignore[attr-defined]
    engine.destroy()
    return {**{n: not first[n].equal(last[n]) for n in first}, "nothing is left": not left}


@pytest.mark.parametrize("stage", STAGES)
def test_dense_gradients_beside_sketched_ones_reach_their_parameters(stage: int) -> None:
    for found in launched_pool_of(RANKS)(mixed, stage):
        assert all(found.values()), found
