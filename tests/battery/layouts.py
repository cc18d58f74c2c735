# SPDX-License-Identifier: Apache-2.0
"""Train the zoo on a layout; add a layout here and it inherits every test of the battery."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from flora_dist import Flora, fsdp1
from flora_dist.core.comm import groups
from flora_dist.core.sketch.keys import canonical_name
from tests.battery import zoo
from tests.battery.flat import bounds_of, layout_of
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


def on_columns(case: Case) -> Weights:
    """FSDP2 with Shard(1) where the columns divide: cuts at blocks, inside them, and narrow."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    model = zoo.build(case.dtype)

    def placement(parameter: nn.Parameter) -> Shard | None:
        divides = parameter.ndim in {2, 3} and parameter.shape[-1] % world_size == 0
        return Shard(parameter.ndim - 1) if divides and parameter.shape[-1] >= 8 else None

    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return _train(model, model, case)


def on_tensor_parallel(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    _parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return _train(model, model, case, data_ranks=1)


def on_fsdp2_and_tensor_parallel(case: Case) -> Weights:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = zoo.build(case.dtype)
    _parallelize(model, mesh["tensor"])
    for layer in (model.up, model.down, model.conv, model.single):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return _train(model, model, case, data_ranks=2)


def _parallelize(model: zoo.Zoo, mesh: DeviceMesh) -> None:
    """Columns of 37 over 2 are 19 and 18: cuts inside blocks of 8, and of different widths."""
    plan = {
        "up": ColwiseParallel(output_layouts=Replicate()),
        "down": RowwiseParallel(input_layouts=Replicate()),
        "wide": RowwiseParallel(input_layouts=Replicate()),
        "square": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def _train_sharded(case: Case, mesh: DeviceMesh) -> Weights:
    model = zoo.build(case.dtype)
    for layer in (model.up, model.down, model.conv, model.single):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _train(model, model, case)


def on_fsdp1(case: Case) -> Weights:
    """One process too, where FSDP1 takes NO_SHARD."""
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    optimizer = Flora(model.named_parameters(), **case.flora)
    fsdp1.attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = zoo.batch(step, SAMPLES)
        model(zoo.share(tokens, dist.get_rank(), dist.get_world_size())).backward()
        optimizer.step()
    return fsdp1_weights(model)


def wrap_in_fsdp1(model: zoo.Zoo, **options: Any) -> FullyShardedDataParallel:
    """Four units of their own, the rest with the root."""
    settings = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
    for name in ("up", "down", "conv", "single"):
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), **settings))
    return FullyShardedDataParallel(model, **settings)


def fsdp1_weights(model: FullyShardedDataParallel) -> Weights:
    """Whole weights of the parameters that train, on every rank."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {canonical_name(name): weight for name, weight in trainable(model).items()}


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


def _train(
    wrapped: nn.Module, model: nn.Module, case: Case, data_ranks: int | None = None
) -> Weights:
    """``data_ranks``: shares of a batch; the ranks of one share follow each other."""
    optimizer = Flora(wrapped.named_parameters(), **case.flora)
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    shares = world_size if data_ranks is None else data_ranks
    share = rank // (world_size // shares)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(zoo.share(zoo.batch(step, SAMPLES), share, shares)).backward()
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
    "columns x2": (2, on_columns),
    "columns x3": (3, on_columns),
    "tp x2": (2, on_tensor_parallel),
    "fsdp2 x tp 2x2": (4, on_fsdp2_and_tensor_parallel),
    "fsdp1 x1": (1, on_fsdp1),
    "fsdp1 x2": (2, on_fsdp1),
    "fsdp1 x3": (3, on_fsdp1),
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
