# SPDX-License-Identifier: Apache-2.0
"""What a step sends under ZeRO-3: the bench's counting on one rank is what real ranks send."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from flora_dist.core.comm.groups import GroupReducer
from tests.bench.zero_bytes import RULES, counted
from tests.conftest import launched_pool_of
from tests.zero.small import PARAMS, build, config_of, start, train

pytestmark = pytest.mark.deepspeed
Sizes = tuple[list[int], list[int]]


def sent(momentum: str) -> Sizes:
    """Bytes of each sum and exchange of one step of this rank."""
    sums: list[int] = []
    exchanges: list[int] = []
    original = GroupReducer.sum_, GroupReducer.exchange

    def sum_(self: GroupReducer, message_S: Tensor) -> None:
        sums.append(message_S.numel() * message_S.element_size())
        original[0](self, message_S)

    def exchange(self: GroupReducer, sent_S: Tensor, sizes: Any) -> Tensor:
        exchanges.append(sent_S.numel() * sent_S.element_size())
        return original[1](self, sent_S, sizes)

    params = {**PARAMS, "momentum": momentum}
    engine, _ = start(config_of(3, optimizer={"type": "Flora", "params": params}))
    GroupReducer.sum_, GroupReducer.exchange = sum_, exchange  # type: ignore[method-assign]
    try:
        train(engine, range(1))
    finally:
        GroupReducer.sum_, GroupReducer.exchange = original  # type: ignore[method-assign]
    return sums, exchanges


@pytest.mark.parametrize("momentum", RULES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_simulated_rank_counts_what_a_real_one_sends(world_size: int, momentum: str) -> None:
    shapes = {name: tuple(p.shape) for name, p in build().named_parameters()}
    settings = {**PARAMS, "momentum": momentum}
    real = launched_pool_of(world_size)(sent, momentum)
    for rank, sizes in enumerate(real):
        reducer = counted(shapes, world_size=world_size, rank=rank, settings=settings)
        assert (reducer.sums, reducer.exchanges) == sizes
