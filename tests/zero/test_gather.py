# SPDX-License-Identifier: Apache-2.0
"""Stages 1 and 2 over gloo gather stepped weights in pieces: the same bits, and no second model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime import utils
from deepspeed.runtime.zero import stage_1_and_2

from flora_dist.frameworks.deepspeed import gather
from tests.bench.wire_counter import Collectives
from tests.conftest import launched_pool_of
from tests.zero.small import config_of, start, train, weights

pytestmark = pytest.mark.deepspeed

RANKS, PIECE = 2, 128
FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
"""An optimizer of its own at stage 1."""
ENGINES = [(1, {}), (2, {}), (1, FP32_SUMS), (2, {"flora": {"gradients": "compressed"}})]


def gathered(stage: int, blocks: dict[str, Any], size: int) -> tuple[list[int], dict[str, Any]]:
    """Elements of each gather of weights, and the weights after two steps."""
    zero = {"stage": stage, "allgather_bucket_size": size}
    engine, _ = start(config_of(stage, zero_optimization=zero, **blocks))
    with Collectives() as collectives:
        train(engine, range(2))
    found = weights(engine)
    engine.destroy()
    return [s.elements for s in collectives.sent if s.kind == "all_gather"], found


def both(stage: int, blocks: dict[str, Any]) -> tuple[list[int], list[int], bool]:
    """Gathers of weights in pieces and at once, and whether the weights are equal bit for bit."""
    pieces, ours = gathered(stage, blocks, PIECE)
    whole, theirs = gathered(stage, blocks, 500_000_000)
    return pieces, whole, all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(("stage", "blocks"), ENGINES)
def test_a_gather_has_a_piece_of_the_weights_and_moves_the_same_bits(
    stage: int, blocks: dict[str, Any]
) -> None:
    for pieces, whole, are_equal in launched_pool_of(RANKS)(both, stage, blocks):
        assert are_equal
        assert sum(pieces) == sum(whole)
        assert max(whole) > 4 * PIECE
        assert max(pieces) < 2 * PIECE


def refused(size: int) -> str:
    """What is said to pieces of that many elements."""
    with pytest.raises(ValueError, match="allgather_bucket_size") as caught:
        start(config_of(2, zero_optimization={"stage": 2, "allgather_bucket_size": size}))
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 2])
def test_pieces_without_elements_of_every_rank_are_refused(size: int) -> None:
    for said in launched_pool_of(RANKS)(refused, size):
        assert "at least 4 where gloo gathers weights over 2 ranks" in said
        assert f"it is {size}" in said


def warned(change: Callable[[Any], None]) -> tuple[list[str], dict[str, Any]]:
    """What two steps of an engine say, and its weights, where DeepSpeed may gather otherwise."""
    own = stage_1_and_2.all_gather_dp_groups
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            change(stage_1_and_2)
            engine, _ = start(config_of(2))
            train(engine, range(2))
            found = weights(engine)
            engine.destroy()
    finally:
        stage_1_and_2.all_gather_dp_groups = own
    said = [str(each.message) for each in caught]
    return [each for each in said if "gathers weights in another way" in each], found


def at_once(module: Any) -> None:
    """By one call, without asking whether there is one."""

    def all_gather_dp_groups(
        groups_flat: Any, partitioned_param_groups: Any, dp_process_group: Any, **_: Any
    ) -> None:
        utils.all_gather_into_tensor_dp_groups(
            groups_flat, partitioned_param_groups, dp_process_group
        )

    module.all_gather_dp_groups = all_gather_dp_groups


def nothing(module: Any) -> None:
    """DeepSpeed as it is."""


def test_a_deepspeed_that_gathers_in_another_way_does_so_and_is_reported_once() -> None:
    run = launched_pool_of(RANKS)
    for (said, theirs), (unsaid, ours) in zip(
        run(warned, at_once), run(warned, nothing), strict=True
    ):
        assert len(said) == 1
        assert unsaid == []
        assert all(theirs[name].equal(ours[name]) for name in ours)


def kept(backend: str) -> bool:
    """Whether an engine over such a backend steps by DeepSpeed's own functions."""
    own = dist.get_backend_config
    gather.dist.get_backend_config = lambda *_: backend  # type: ignore[attr-defined]
    try:
        engine, _ = start(config_of(2))
    finally:
        gather.dist.get_backend_config = own  # type: ignore[attr-defined]
    found = "update_lp_params" not in vars(engine.optimizer)
    engine.destroy()
    return found


@pytest.mark.parametrize(("backend", "is_kept"), [("cpu:ucc,cuda:nccl", True), ("cpu:gloo", False)])
def test_a_backend_that_gathers_in_place_keeps_its_one_call(backend: str, is_kept: bool) -> None:
    assert launched_pool_of(RANKS)(kept, backend) == [is_kept] * RANKS
