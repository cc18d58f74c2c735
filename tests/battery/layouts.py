# SPDX-License-Identifier: Apache-2.0
"""Train the zoo on a layout; add a layout here and it inherits every test of the battery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flora_dist import Flora
from flora_dist.comm import groups
from tests.battery import zoo
from tests.battery.flat import FlatLayout, WorldReducer, bounds_of
from tests.battery.mutations import mutated
from tests.battery.oracle import SAMPLES, STEPS, Case, trainable

Weights = dict[str, Tensor]


def on_plain(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    return _train(model, model, case)


def on_ddp(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    return _train(DistributedDataParallel(model), model, case)


def on_compiled_ddp(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    compiled = torch.compile(model, backend="aot_eager")
    return _train(DistributedDataParallel(compiled), model, case)


def on_fsdp2(case: Case) -> Weights:
    return _train_sharded(case, init_device_mesh("cpu", (dist.get_world_size(),)))


def on_hsdp(case: Case) -> Weights:
    names = ("replicate", "shard")
    return _train_sharded(case, init_device_mesh("cpu", (2, 2), mesh_dim_names=names))


def _train_sharded(case: Case, mesh: DeviceMesh) -> Weights:
    model = zoo.build(case.dtype)
    for layer in (model.up, model.down, model.conv, model.single):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _train(model, model, case)


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
    optimizer.attach_layout(FlatLayout(flat, shapes, bounds))
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


def _train(wrapped: nn.Module, model: nn.Module, case: Case) -> Weights:
    optimizer = Flora(wrapped.named_parameters(), **case.flora)
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(zoo.share(zoo.batch(step, SAMPLES), rank, world_size)).backward()
        optimizer.step()
    return full_weights(model)


def full_weights(model: nn.Module) -> Weights:
    """Whole weights of the parameters that train, on every rank."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in trainable(model).items()
    }


LAYOUTS: dict[str, tuple[int, Callable[[Case], Weights]]] = {
    "ddp x2": (2, on_ddp),
    "compiled ddp x2": (2, on_compiled_ddp),
    "fsdp2 x2": (2, on_fsdp2),
    "fsdp2 x3": (3, on_fsdp2),
    "fsdp2 x4": (4, on_fsdp2),
    "hsdp 2x2": (4, on_hsdp),
    "flat x1": (1, on_flat),
    "flat x2": (2, on_flat),
    "flat x3": (3, on_flat),
    "flat x4": (4, on_flat),
}
"""Name -> (ranks, how to train the zoo there)."""


def run(layout: str, case: Case, mutation: str = "") -> Weights:
    """One rank's share of a battery run; ``mutation`` breaks one mechanism first."""
    with mutated(mutation):
        return LAYOUTS[layout][1](case)


def count_collectives(layout: str, case: Case) -> int:
    """Sums per step that the optimizer itself asked for."""
    counted = 0
    with _spied(groups.MeshReducer) as mesh, _spied(WorldReducer) as world:
        LAYOUTS[layout][1](case)
        counted = mesh() + world()
    assert counted % STEPS == 0, counted
    return counted // STEPS


@contextmanager
def _spied(reducer: Any) -> Iterator[Callable[[], int]]:
    original, calls = reducer.sum_, []

    def sum_(self: Any, message_S: Tensor) -> None:
        calls.append(message_S.numel())
        original(self, message_S)

    reducer.sum_ = sum_
    try:
        yield lambda: len(calls)
    finally:
        reducer.sum_ = original
