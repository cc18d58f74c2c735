# SPDX-License-Identifier: Apache-2.0
"""FSDP1, FSDP2 and HSDP: the transformer's layers and the root, each sharded as one unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy

from flora_dist.flora import Flora
from flora_dist.trainer.arrange import layers_of
from flora_dist.trainer.config import Config
from flora_dist.trainer.replicated import Spread, World, over


def fsdp1(model: nn.Module, config: Config, world: World) -> Spread:
    """FullyShardedDataParallel over all processes; Flora has to be attached."""
    layers = set(layers_of(model))
    frees = config.backend.reshard_after_forward
    root = FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: module in layers),
        sharding_strategy=(
            ShardingStrategy.FULL_SHARD if frees else ShardingStrategy.SHARD_GRAD_OP
        ),
        mixed_precision=(
            None
            if config.train.precision == "float32"
            else MixedPrecision(param_dtype=_arithmetic(config), reduce_dtype=torch.float32)
        ),
        device_id=world.device,
        use_orig_params=True,
    )
    spread = over(
        root,
        config,
        module=root,
        synchronising=lambda last: nullcontext() if last else root.no_sync(),
        arithmetic=nullcontext,
        # Each process holds flat parts: torch's own function would take their norms for whole ones.
        clip=root.clip_grad_norm_,
    )

    def norm(optimizer: torch.optim.Optimizer) -> float | None:
        return float(optimizer.grad_norm()) if isinstance(optimizer, Flora) else None

    return replace(spread, norm=norm)


def fsdp2(model: nn.Module, config: Config, world: World) -> Spread:
    """fully_shard over all processes."""
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return _fully_sharded(model, config, mesh)


def hsdp(model: nn.Module, config: Config, world: World) -> Spread:
    """fully_shard over groups of processes that each hold the whole model."""
    shape = (config.backend.replicate or 1, config.backend.shard or 1)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return _fully_sharded(model, config, mesh)


def _fully_sharded(model: nn.Module, config: Config, mesh: DeviceMesh) -> Spread:
    policy = MixedPrecisionPolicy(param_dtype=_arithmetic(config), reduce_dtype=torch.float32)
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=_resting(config, mesh))
    for layer in layers_of(model):
        shard(layer, reshard_after_forward=config.backend.reshard_after_forward)
    # The root's weights (embedding, head) are needed again at once: freeing them gains nothing.
    root = shard(model, reshard_after_forward=False)

    @contextmanager
    def synchronising(last: bool) -> Iterator[None]:
        root.set_requires_gradient_sync(last)
        yield

    def free() -> None:
        # Only a backward pass reshards what the forward pass kept. Until then the model's
        # parameters are the whole ones, and neither optimizer nor checkpoint knows those.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    return over(
        model,
        config,
        module=model,
        synchronising=synchronising,
        arithmetic=nullcontext,
        free=free,
    )


def _resting(config: Config, mesh: DeviceMesh) -> OffloadPolicy:
    """Where shards rest. Pinned memory is an accelerator's; without one torch refuses to pin."""
    if not config.backend.cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")


def _arithmetic(config: Config) -> torch.dtype | None:
    """What weights are gathered in; None: as they are. Gradients are summed in float32 always."""
    return torch.bfloat16 if config.train.precision == "bfloat16" else None
