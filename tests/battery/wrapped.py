# SPDX-License-Identifier: Apache-2.0
"""The one table of layouts: how each of torch's holds the zoo, and on how many ranks.

Battery, sketched gradients, checkpoints and torch's own checkpoints take theirs from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from flora_dist import Flora, fsdp1
from flora_dist.core.sketch.keys import canonical_name
from tests.battery import zoo
from tests.battery.oracle import trainable

Weights = dict[str, Tensor]
UNITS = ("up", "down", "conv", "single")
"""Layers that are sharded by themselves; the rest goes with the root."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to hold the zoo."""

    ranks: int
    wrap: Callable[[zoo.Zoo], nn.Module]
    """Shards the zoo, in place or inside of what it returns."""
    shares: int | None = None
    """Of a batch, if not one per rank; the ranks of one share follow each other."""

    def share(self, samples: Tensor) -> Tensor:
        """This rank's part of a batch."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        shares = self.shares or self.ranks
        return zoo.share(samples, rank // (self.ranks // shares), shares)


def optimizer_of(wrapped: nn.Module, **settings: Any) -> Flora:
    """A Flora that knows how the model is held."""
    optimizer = Flora(wrapped.named_parameters(), **settings)
    if isinstance(wrapped, FullyShardedDataParallel):
        fsdp1.attach(wrapped, optimizer)
    return optimizer


def weights_of(wrapped: nn.Module, model: nn.Module) -> Weights:
    """Whole weights of the parameters that train, on every rank; ``model``: not wrapped."""
    if isinstance(wrapped, FullyShardedDataParallel):
        return fsdp1_weights(wrapped)
    return full_weights(model)


def full_weights(model: nn.Module) -> Weights:
    """The same of a model of plain tensors and DTensors."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in trainable(model).items()
    }


def fsdp1_weights(model: FullyShardedDataParallel) -> Weights:
    """The same under FSDP1."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {canonical_name(name): weight for name, weight in trainable(model).items()}


# ---- how the zoo is wrapped


def as_it_is(model: zoo.Zoo) -> nn.Module:
    return model


def in_ddp(model: zoo.Zoo) -> nn.Module:
    return DistributedDataParallel(model)


def in_compiled_ddp(model: zoo.Zoo) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend="aot_eager"))


def in_fsdp2(model: zoo.Zoo) -> nn.Module:
    return shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def in_hsdp(model: zoo.Zoo) -> nn.Module:
    names = ("replicate", "shard")
    return shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=names))


def by_columns(model: zoo.Zoo) -> nn.Module:
    """FSDP2 with Shard(1) where the columns divide: cuts at blocks, inside them, and narrow."""
    world_size = dist.get_world_size()

    def placement(parameter: nn.Parameter) -> Shard | None:
        divides = parameter.ndim in {2, 3} and parameter.shape[-1] % world_size == 0
        return Shard(parameter.ndim - 1) if divides and parameter.shape[-1] >= 8 else None

    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), shard_placement_fn=placement)
    return model


def in_tensor_parallel(model: zoo.Zoo) -> nn.Module:
    parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def in_fsdp2_and_tensor_parallel(model: zoo.Zoo) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh["tensor"])
    return shard(model, mesh["data"])


def wrap_in_fsdp1(model: zoo.Zoo, **options: Any) -> FullyShardedDataParallel:
    """On one process too, where FSDP1 takes NO_SHARD."""
    settings = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
    for name in UNITS:
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), **settings))
    return FullyShardedDataParallel(model, **settings)


def shard(model: zoo.Zoo, mesh: DeviceMesh) -> zoo.Zoo:
    """By FSDP2."""
    for name in UNITS:
        fully_shard(getattr(model, name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def parallelize(
    model: zoo.Zoo,
    mesh: DeviceMesh,
    columnwise: Sequence[str] = ("up",),
    rowwise: Sequence[str] = ("down", "wide", "square"),
) -> None:
    """Columns of 37 over 2 are 19 and 18: cuts inside blocks of 8, and of different widths."""
    plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in columnwise}
    rows = {name: RowwiseParallel(input_layouts=Replicate()) for name in rowwise}
    parallelize_module(model, mesh, {**plan, **rows})


def in_fsdp2_and_aligned(model: zoo.Zoo) -> nn.Module:
    """Rows of ``up``, and columns of ``square`` between its blocks, beside FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh["tensor"], rowwise=("square",))
    return shard(model, mesh["data"])


def by_cut_blocks(model: zoo.Zoo) -> nn.Module:
    """Tensor parallelism by columns alone, which cuts inside blocks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize(model, mesh, columnwise=(), rowwise=("down", "wide"))
    return model


ALIGNED, CUT = "fsdp2 x aligned tp 2x2", "cut blocks x2"
LAYOUTS: dict[str, Layout] = {
    "plain": Layout(ranks=1, wrap=as_it_is),
    "ddp x2": Layout(ranks=2, wrap=in_ddp),
    "compiled ddp x2": Layout(ranks=2, wrap=in_compiled_ddp),
    "fsdp2 x2": Layout(ranks=2, wrap=in_fsdp2),
    "fsdp2 x3": Layout(ranks=3, wrap=in_fsdp2),
    "fsdp2 x4": Layout(ranks=4, wrap=in_fsdp2),
    "hsdp 2x2": Layout(ranks=4, wrap=in_hsdp),
    "columns x2": Layout(ranks=2, wrap=by_columns),
    "columns x3": Layout(ranks=3, wrap=by_columns),
    "tp x2": Layout(ranks=2, wrap=in_tensor_parallel, shares=1),
    "fsdp2 x tp 2x2": Layout(ranks=4, wrap=in_fsdp2_and_tensor_parallel, shares=2),
    ALIGNED: Layout(ranks=4, wrap=in_fsdp2_and_aligned, shares=2),
    CUT: Layout(ranks=2, wrap=by_cut_blocks, shares=1),
    "fsdp1 x1": Layout(ranks=1, wrap=wrap_in_fsdp1),
    "fsdp1 x2": Layout(ranks=2, wrap=wrap_in_fsdp1),
    "fsdp1 x3": Layout(ranks=3, wrap=wrap_in_fsdp1),
}
"""Name -> how it holds the zoo. Add one here: the battery and sketched gradients train on it."""
