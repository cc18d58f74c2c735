# SPDX-License-Identifier: Apache-2.0
"""Train the zoo with sketched gradients on every layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import flora_dist
from flora_dist import Flora
from tests.battery import zoo
from tests.battery.layouts import _parallelize, full_weights
from tests.battery.oracle import STEPS
from tests.gradients.faults import broken
from tests.gradients.oracle import SketchedCase, Weights

UNITS = ("up", "down", "conv", "single")


def on_plain(case: SketchedCase) -> tuple[Weights, list[float]]:
    model = zoo.build(case.dtype)
    return train(model, model, case, shares=1)


def on_ddp(case: SketchedCase) -> tuple[Weights, list[float]]:
    model = zoo.build(case.dtype)
    return train(DistributedDataParallel(model), model, case)


def on_compiled_ddp(case: SketchedCase) -> tuple[Weights, list[float]]:
    model = zoo.build(case.dtype)
    compiled = torch.compile(model, backend="aot_eager")
    return train(DistributedDataParallel(compiled), model, case)


def on_fsdp2(case: SketchedCase) -> tuple[Weights, list[float]]:
    model = shard(zoo.build(case.dtype), init_device_mesh("cpu", (dist.get_world_size(),)))
    return train(model, model, case)


def on_hsdp(case: SketchedCase) -> tuple[Weights, list[float]]:
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    model = shard(zoo.build(case.dtype), mesh)
    return train(model, model, case)


def on_columns(case: SketchedCase) -> tuple[Weights, list[float]]:
    """FSDP2 with Shard(1) where the columns divide, cuts inside blocks among them."""
    world_size = dist.get_world_size()

    def placement(parameter: nn.Parameter) -> Shard | None:
        divides = parameter.ndim in {2, 3} and parameter.shape[-1] % world_size == 0
        return Shard(parameter.ndim - 1) if divides and parameter.shape[-1] >= 8 else None

    model = zoo.build(case.dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), shard_placement_fn=placement)
    return train(model, model, case)


def on_tensor_parallel(case: SketchedCase) -> tuple[Weights, list[float]]:
    model = zoo.build(case.dtype)
    _parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return train(model, model, case, shares=1)


def on_fsdp2_and_tensor_parallel(case: SketchedCase) -> tuple[Weights, list[float]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = zoo.build(case.dtype)
    _parallelize(model, mesh["tensor"])
    return train(shard(model, mesh["data"]), model, case, shares=2)


def shard(model: zoo.Zoo, mesh: DeviceMesh) -> zoo.Zoo:
    """Four units of their own, the rest with the root."""
    for name in UNITS:
        fully_shard(getattr(model, name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(
    wrapped: nn.Module, model: nn.Module, case: SketchedCase, shares: int | None = None
) -> tuple[Weights, list[float]]:
    """``shares``: of a batch; the ranks of one share follow each other."""
    optimizer = Flora(wrapped.named_parameters(), **case.flora)
    flora_dist.attach(
        wrapped,
        optimizer,
        case.level,
        gradient_rank=case.gradient_rank,
        wire_dtype=case.wire_dtype,
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    shares = world_size if shares is None else shares
    norms = []
    for step in range(STEPS):
        tokens = zoo.share(zoo.batch(step, case.samples), rank // (world_size // shares), shares)
        accumulate(wrapped, tokens, case.micro_batches)
        if case.max_norm is None:
            norms.append(float(optimizer.grad_norm()))
        else:
            norms.append(float(optimizer.clip_grad_norm_(case.max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return full_weights(model), norms


def accumulate(wrapped: nn.Module, tokens: Tensor, micro_batches: int) -> None:
    """Every micro-batch but the last without FSDP2's own reductions, DDP always with its own."""
    for number, part in enumerate(tokens.chunk(micro_batches), start=1):
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(number == micro_batches)
        (wrapped(part) / micro_batches).backward()


Trainer = Callable[[SketchedCase], tuple[Weights, list[float]]]
LAYOUTS: dict[str, tuple[int, Trainer]] = {
    "plain": (1, on_plain),
    "ddp x2": (2, on_ddp),
    "compiled ddp x2": (2, on_compiled_ddp),
    "fsdp2 x2": (2, on_fsdp2),
    "fsdp2 x3": (3, on_fsdp2),
    "fsdp2 x4": (4, on_fsdp2),
    "hsdp 2x2": (4, on_hsdp),
    "columns x2": (2, on_columns),
    "tp x2": (2, on_tensor_parallel),
    "fsdp2 x tp 2x2": (4, on_fsdp2_and_tensor_parallel),
}
"""Name -> (ranks, how to train the zoo there)."""


def run(layout: str, case: SketchedCase, fault: str = "") -> tuple[Weights, list[float]]:
    """One rank's share of a run; ``fault`` breaks one mechanism first."""
    with broken(fault):
        return LAYOUTS[layout][1](case)
