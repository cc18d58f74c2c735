# SPDX-License-Identifier: Apache-2.0
"""Train the zoo on a layout: those of torch, and flat spans, as ZeRO has them, by hand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.core.comm import groups
from tests.battery import wrapped, zoo
from tests.battery.flat import bounds_of, layout_of
from tests.battery.mutations import mutated
from tests.battery.oracle import SAMPLES, STEPS, Case, trainable
from tests.battery.wrapped import Layout, Weights, optimizer_of, weights_of


def on_plain(case: Case) -> Weights:
    return _train(wrapped.LAYOUTS["plain"], case)


def on_flat(case: Case) -> Weights:
    """ZeRO by hand: whole model everywhere, mean gradients, each rank steps its span."""
    model = zoo.build(case.dtype)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bounds = bounds_of(shapes, world_size)
    mine = slice(bounds[rank], bounds[rank + 1])
    line = torch.cat([p.detach().flatten() for p in parameters.values()])
    flat = nn.Parameter(line[mine].clone())
    optimizer = Flora([flat], **case.flora)
    optimizer.attach_layout(layout_of(flat, shapes, bounds))
    for step in range(STEPS):
        model.zero_grad()
        model(zoo.share(zoo.batch(step, SAMPLES), rank, world_size)).backward()
        gradient = torch.cat([_dense_gradient(p).flatten() for p in parameters.values()])
        dist.all_reduce(gradient)
        flat.grad = (gradient / world_size)[mine].clone()
        optimizer.step()
        line = torch.zeros_like(line)
        line[mine] = flat.detach()
        dist.all_reduce(line)
        with torch.no_grad():
            start = 0
            for parameter in parameters.values():
                values = line[start : start + parameter.numel()]
                parameter.copy_(values.view_as(parameter))
                start += parameter.numel()
    return trainable(model)


def _dense_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _train(layout: Layout, case: Case) -> Weights:
    model = zoo.build(case.dtype)
    held = layout.wrap(model)
    optimizer = optimizer_of(held, **case.flora)
    for step in range(STEPS):
        optimizer.zero_grad()
        held(layout.share(zoo.batch(step, SAMPLES))).backward()
        optimizer.step()
    return weights_of(held, model)


LAYOUTS: dict[str, tuple[int, Callable[[Case], Weights]]] = {
    **{
        name: (layout.ranks, partial(_train, layout))
        for name, layout in wrapped.LAYOUTS.items()
        if name not in {"plain", wrapped.ALIGNED, wrapped.CUT}
    },
    "flat x1": (1, on_flat),
    # The first of a family has most of the default run: cuts inside rows and blocks at three ranks.
    "flat x3": (3, on_flat),
    "flat x2": (2, on_flat),
    "flat x4": (4, on_flat),
}
"""Name -> (ranks, how to train the zoo there)."""


def place_of(layout: str) -> dict[str, Hashable]:
    """Its kind and its number of ranks."""
    family, _, size = layout.rpartition(" ")
    ranks = prod(int(number) for number in size.split("x") if number.isdigit())
    return {"family": family or layout, "ranks": ranks}


def run(layout: str, case: Case, mutation: str = "") -> Weights:
    """One rank's share of a battery run; ``mutation`` breaks one mechanism first."""
    with mutated(mutation):
        return LAYOUTS[layout][1](case)


def count_messages(layout: str, case: Case) -> int:
    """Messages per step that the optimizer itself asked to be summed."""
    return counted(lambda: LAYOUTS[layout][1](case))


def counted(train: Callable[[], Any]) -> int:
    """The same of a run of ``STEPS`` steps."""
    doors = [
        (groups.MeshReducer, "sum_"),
        (groups.GroupReducer, "sum_"),
        (groups.GroupReducer, "exchange"),
    ]
    with ExitStack() as stack:
        counts = [stack.enter_context(_spied(*door)) for door in doors]
        train()
        total = sum(count() for count in counts)
    assert total % STEPS == 0, total
    return total // STEPS


@contextmanager
def _spied(reducer: Any, method: str) -> Iterator[Callable[[], int]]:
    original, calls = getattr(reducer, method), []

    def spy(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        return original(self, *arguments)

    setattr(reducer, method, spy)
    try:
        yield lambda: len(calls)
    finally:
        setattr(reducer, method, original)
