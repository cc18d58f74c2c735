# SPDX-License-Identifier: Apache-2.0
"""Gradients that are missing or not finite, on some ranks or on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flora_dist import Flora
from tests.battery import zoo
from tests.battery.oracle import SAMPLES, STEPS, Case, distances, reference_of, trainable
from tests.battery.test_layouts import EXACT
from tests.battery.variants import (
    Gradients,
    Weights,
    differing,
    follow,
    local_state,
    shard,
    train,
    whole_weights,
)
from tests.conftest import pool_of

# A ragged matrix, experts, a matrix of one row (which most ranks hold nothing of), and a vector.
NAMES = ("up.weight", "experts", "single.weight", "up.bias")
# The first step has no state yet; step 4 is inside a window, 5 (the 6th) opens one.
STEPS_WITHOUT = (0, 4, 5)
HANG = 60.0
"""Seconds: a rank that waits for another is stopped."""


def _drop(case: Case, ranks: tuple[int, ...]) -> tuple[Weights, dict[str, int]]:
    model = zoo.build(case.dtype)
    shard(model)
    parameters = dict(model.named_parameters())
    optimizer = Flora(parameters.items(), **case.flora)

    def drop(step: int) -> None:
        if step in STEPS_WITHOUT and dist.get_rank() in ranks:
            for name in NAMES:
                parameters[name].grad = None

    weights = train(model, optimizer, before_step=drop)
    return weights, {name: optimizer.state[parameters[name]]["step"] for name in NAMES}


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "none"])
@pytest.mark.parametrize(("world_size", "ranks"), [(2, (1,)), (3, (0, 2))])
def test_a_gradient_missing_on_some_ranks_counts_as_zero_there(
    world_size: int, ranks: tuple[int, ...], momentum: str
) -> None:
    case = Case(settings={"momentum": momentum})

    def zero_their_rows(step: int, gradients: Gradients) -> Gradients:
        if step in STEPS_WITHOUT:
            for name in NAMES:
                gradient = gradients[name]
                assert gradient is not None
                pieces = gradient.chunk(world_size)  # as FSDP2 cuts
                for rank in ranks:
                    if rank < len(pieces):
                        pieces[rank].zero_()
        return gradients

    expected = follow(case, zoo.build(case.dtype), change=zero_their_rows)
    for weights, counts in pool_of(world_size)(_drop, case, ranks, timeout=HANG):
        assert distances(*expected, weights)[1] < EXACT
        assert counts == dict.fromkeys(NAMES, STEPS)


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "none"])
def test_a_gradient_missing_on_all_ranks_skips_the_parameter_and_its_count(momentum: str) -> None:
    case = Case(settings={"momentum": momentum, "weight_decay": 0.1})

    def without(step: int, gradients: Gradients) -> Gradients:
        missing = NAMES if step in STEPS_WITHOUT else ()
        return {name: None if name in missing else g for name, g in gradients.items()}

    expected = follow(case, zoo.build(case.dtype), change=without)
    for weights, counts in pool_of(2)(_drop, case, (0, 1), timeout=HANG):
        assert distances(*expected, weights)[1] < EXACT
        assert counts == dict.fromkeys(NAMES, STEPS - len(STEPS_WITHOUT))


def _poison(case: Case, name: str, value: float) -> tuple[list[str], Weights]:
    """One element of rank 1's gradient is ``value`` at step 4: what that step changed."""
    model = zoo.build(case.dtype)
    shard(model)
    parameters = dict(model.named_parameters())
    optimizer = Flora(parameters.items(), **case.flora)

    def everything() -> dict[str, Any]:
        weights = {n: p.to_local().clone() for n, p in trainable(model).items()}
        return {**weights, **local_state(optimizer)}

    def poison(step: int) -> None:
        if step == 4 and dist.get_rank() == 1:
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.to_local().view(-1)[0] = value

    train(model, optimizer, steps=range(4))
    before = everything()
    train(model, optimizer, steps=[4], before_step=poison)
    changed = differing(before, everything())
    return changed, train(model, optimizer, steps=range(5, STEPS))


@pytest.mark.parametrize(
    ("name", "value", "settings"),
    [
        ("up.weight", float("nan"), {"momentum": "flora"}),
        ("experts", float("inf"), {"momentum": "flora_strict"}),
        ("up.bias", float("-inf"), {"momentum": "none", "clip": None}),
        ("conv.weight", float("nan"), {"momentum": "blend", "clip": None}),
        # finite, but its square is not
        ("up.weight", 1e200, {"momentum": "flora"}),
        ("up.bias", 1e200, {"momentum": "flora"}),
    ],
)
def test_a_gradient_not_finite_on_one_rank_skips_the_step_on_every_rank(
    name: str, value: float, settings: dict[str, Any]
) -> None:
    case = Case(settings={**settings, "skip_nonfinite": True})

    def without_step_4(step: int, gradients: Gradients) -> Gradients:
        return dict.fromkeys(gradients) if step == 4 else gradients

    expected = follow(case, zoo.build(case.dtype), change=without_step_4)
    for changed, weights in pool_of(2)(_poison, case, name, value, timeout=HANG):
        assert changed == []
        assert distances(*expected, weights)[1] < EXACT


def test_without_skip_nonfinite_a_nan_goes_through_as_in_torch() -> None:
    case = Case(settings={"momentum": "flora"})
    for changed, weights in pool_of(2)(_poison, case, "up.weight", float("nan"), timeout=HANG):
        assert "up.weight.step" in changed
        assert not weights["up.weight"].isfinite().all()


class _Branching(zoo.Zoo):
    """The zoo with a layer that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(zoo.WIDTH, 16)
        with torch.no_grad():
            for parameter in self.extra.parameters():
                parameter.fill_(0.02)

    def forward(self, tokens_BT: Tensor, use_extra: bool = True) -> Tensor:
        loss = super().forward(tokens_BT)
        if use_extra:
            loss = loss + self.extra(self.embed(tokens_BT)).tanh().square().mean()
        return loss


def _uses_extra(step: int, rank: int) -> bool:
    """Nobody at steps 0 and 3, rank 0 alone at 1 and 4, everybody else."""
    return (rank == 0 or step > 4) if step not in {0, 3} else False


def _train_branching(case: Case) -> tuple[Weights, int]:
    model = _Branching().to(case.dtype)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = Flora(wrapped.named_parameters(), **case.flora)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = zoo.share(zoo.batch(step, SAMPLES), rank, world_size)
        wrapped(tokens, _uses_extra(step, rank)).backward()
        optimizer.step()
    return whole_weights(model), optimizer.state[model.extra.weight]["step"]


def _follow_branching(case: Case, world_size: int) -> tuple[Weights, Weights]:
    """The reference on the mean over ranks, where a rank without the branch counts as zero."""
    model = _Branching().to(case.dtype)
    start = trainable(model)
    reference = reference_of(case, start)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(STEPS):
        model.zero_grad()
        for rank in range(world_size):  # backward adds; nobody's branch leaves None
            tokens = zoo.share(zoo.batch(step, SAMPLES), rank, world_size)
            (model(tokens, _uses_extra(step, rank)) / world_size).backward()
        reference.step({name: p.grad for name, p in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return start, dict(reference.weights)


def test_ddp_with_unused_parameters_equals_the_reference() -> None:
    case = Case(settings={"momentum": "flora"})
    expected = _follow_branching(case, 2)
    for weights, count in pool_of(2)(_train_branching, case, timeout=HANG):
        assert distances(*expected, weights)[1] < EXACT
        assert count == STEPS - 2
