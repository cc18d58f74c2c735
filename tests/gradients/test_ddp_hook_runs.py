# SPDX-License-Identifier: Apache-2.0
"""Whole runs with ``flora_hook``: resumed, trained on, uneven, compiled, copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from flora_dist.ddp import FloraState, flora_hook
from tests.conftest import pool_of
from tests.gradients.small import Small, my_inputs, refused
from tests.gradients.test_ddp_hook import (
    BLOCK,
    RANK,
    ROUNDING,
    SEED,
    gradients_of,
    hooked,
    mean_gradients,
    worst,
)

pytestmark = pytest.mark.ranks(2)


def resumed() -> tuple[float, str]:
    """Distance between iteration 2 of a run and of one that was resumed before it."""
    first, state = hooked(Small().double())
    first(my_inputs(0).double()).backward()
    saved = pickle.loads(pickle.dumps(state.state_dict()))
    first.zero_grad()
    first(my_inputs(1).double()).backward()
    second, other = hooked(Small().double())
    other.load_state_dict(saved)
    second(my_inputs(1).double()).backward()
    got, wanted = gradients_of(second), gradients_of(first)
    different = max(float((got[name] - wanted[name]).abs().max()) for name in wanted)
    saved["seed"] = 4
    return different, refused(lambda: other.load_state_dict(saved), ValueError)


def test_a_resumed_run_draws_the_same_projections() -> None:
    for different, message in pool_of(2)(resumed):
        assert different == 0.0
        assert "must have seed=3; it has 4" in message


def trained() -> tuple[float, float, bool]:
    """First and last loss under AdamW, and whether the ranks have equal weights."""
    model = Small()
    wrapped, _ = hooked(model, bucket_cap_mb=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = wrapped(my_inputs(0))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return losses[0], losses[-1], all(torch.equal(mine, other) for other in theirs)


def test_adamw_trains_on_the_estimates() -> None:
    for first, last, are_equal in pool_of(2)(trained):
        assert last < 0.5 * first
        assert are_equal


def uneven() -> tuple[int, float]:
    """Iterations, and a sum of the weights, where rank 1 has two inputs more."""
    model = Small()
    wrapped, state = hooked(model, bucket_cap_mb=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with Join([wrapped]):
        for step in range(3 + 2 * dist.get_rank()):
            wrapped(my_inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state.iteration, sum(float(p.detach().double().sum()) for p in model.parameters())


def test_a_rank_that_has_run_out_of_inputs_counts_along() -> None:
    one, other = pool_of(2)(uneven)
    assert one == other
    assert one[0] == 5


def compiled() -> float:
    module = torch.compile(Small().double(), backend="aot_eager")
    wrapped = DistributedDataParallel(module)
    state = FloraState(wrapped.named_parameters(), rank=RANK, block=BLOCK, seed=SEED)
    wrapped.register_comm_hook(state, flora_hook)
    wrapped(my_inputs(0).double()).backward()
    return worst(gradients_of(wrapped), mean_gradients(0), 1)


def test_the_prefixes_of_wrappers_change_no_projection() -> None:
    assert max(pool_of(2)(compiled)) < ROUNDING


def copied() -> tuple[bool, str]:
    wrapped, state = hooked(Small())
    twin = copy.deepcopy(wrapped)  # AveragedModel does so
    return twin._comm_hooks[0][1] is state, refused(lambda: pickle.dumps(state), TypeError)


def test_a_copy_of_ddp_shares_the_state_and_pickle_is_refused() -> None:
    assert pool_of(2)(copied) == [(True, "FloraState cannot be pickled. " + SAVE)] * 2


SAVE = "Save state_dict(), a few numbers."
