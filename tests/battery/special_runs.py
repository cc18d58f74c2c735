# SPDX-License-Identifier: Apache-2.0
"""Bodies of ``test_fsdp2_variants.py`` that change the run or look inside it, on each rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from flora_dist import Flora
from tests.battery import zoo
from tests.battery.oracle import STEPS, Case, distances, reference_of, trainable
from tests.battery.variants import (
    Weights,
    differing,
    local_state,
    shard,
    train,
    whole,
    whole_weights,
)

# Frozen at some steps: from the start, after some steps, and a vector.
FROZEN_AT = {"square.weight": range(4), "experts": range(5, 8), "up.bias": range(2, 5)}


def thaw(case: Case) -> tuple[Weights, dict[str, int]]:
    """Parameters freeze and thaw on the way; whole weights, and steps counted."""
    model = zoo.build(case.dtype)
    shard(model)
    parameters = dict(model.named_parameters())
    optimizer = Flora(parameters.items(), **case.flora)
    for step in range(STEPS):
        for name, steps in FROZEN_AT.items():
            parameters[name].requires_grad_(step not in steps)
        train(model, optimizer, steps=[step])
    counts = {name: optimizer.state[parameters[name]]["step"] for name in FROZEN_AT}
    return whole_weights(model), counts


def with_experts(dtype: torch.dtype, shape: tuple[int, int, int]) -> zoo.Zoo:
    """The zoo with experts of another shape (the last size stays 13)."""
    model = zoo.build(dtype)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    model.experts = nn.Parameter((0.1 * values).to(dtype))
    return model


def train_experts(case: Case, shape: tuple[int, int, int], dim: int) -> tuple[Weights, Any]:
    """Experts sharded on ``dim``; whole weights, and the local shape of the experts."""
    model = with_experts(case.dtype, shape)
    shard(model, shard_placement_fn=partial(_experts_on, dim=dim))
    assert isinstance(model.experts, DTensor)
    assert model.experts.placements == (Shard(dim),)
    weights = train(model, Flora(model.named_parameters(), **case.flora))
    return weights, tuple(model.experts.to_local().shape)


def _experts_on(parameter: nn.Parameter, dim: int) -> Shard | None:
    return Shard(dim) if parameter.ndim == 3 and parameter.shape[-1] == 13 else None


def refuse_channels(case: Case) -> tuple[str, list[str], int]:
    """A kernel sharded by input channels: the error, what it changed, how much state there is."""
    model = zoo.build(case.dtype)
    shard(model, shard_placement_fn=_conv_by_channels)
    optimizer = Flora(model.named_parameters(), **case.flora)
    before = whole_weights(model)
    try:
        train(model, optimizer, steps=[0])
    except ValueError as error:
        return str(error), differing(before, whole_weights(model)), len(optimizer.state)
    return "", [], -1


def _conv_by_channels(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.shape == (6, 2, 3) else None


def mixed_precision(case: Case) -> tuple[float, float]:
    """bf16 compute, fp32 weights; distances to a reference fed with the reduced gradients."""
    model = zoo.build(case.dtype)
    start = trainable(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=policy)
    reference = reference_of(case, start)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def feed(step: int) -> None:
        del step
        reference.step({name: whole(p.grad) for name, p in parameters.items()})

    weights = train(model, Flora(model.named_parameters(), **case.flora), before_step=feed)
    return distances(start, dict(reference.weights), weights)


def low_precision(case: Case, dim: int) -> list[str]:
    """bf16 weights and momentum, equal gradients: what differs in any bit from a plain run.

    ``dim``: that experts are sharded on.
    """
    plain, sharded = (with_experts(case.dtype, (3, 6, 13)) for _ in range(2))
    shard(sharded, shard_placement_fn=partial(_experts_on, dim=dim))
    pairs = [
        (name, ours, theirs)
        for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True)
        if ours.requires_grad
    ]
    optimizers = [Flora(m.named_parameters(), **case.flora) for m in (sharded, plain)]
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        for _, ours, theirs in pairs:
            theirs.grad = torch.randint(-3, 4, theirs.shape, generator=generator).to(case.dtype)
            ours.grad = distribute_tensor(
                theirs.grad, ours.device_mesh, ours.placements, src_data_rank=None
            )
        for optimizer in optimizers:
            optimizer.step()
    found = differing(whole_weights(sharded), whole_weights(plain))
    for name, ours, theirs in pairs:
        states = [o.state[p] for o, p in zip(optimizers, (ours, theirs), strict=True)]
        ours_whole = {f"{name}.{key}": _whole_or_number(v) for key, v in states[0].items()}
        found += differing(ours_whole, {f"{name}.{key}": v for key, v in states[1].items()})
    return found


def _whole_or_number(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value


def replicas(case: Case) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """HSDP 2x2: local weights and state, and the placements and shapes of the state."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = zoo.build(case.dtype)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Flora(model.named_parameters(), **case.flora)
    train(model, optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds = {
        f"{names[parameter]}.{key}": (str(value.placements), tuple(value.shape))
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    weights = {n: p.to_local() for n, p in trainable(model).items()}
    return {**weights, **local_state(optimizer)}, kinds


def ddp_state(case: Case) -> dict[str, Any]:
    """Weights and state of a rank under DDP."""
    model = zoo.build(case.dtype)
    wrapped = DistributedDataParallel(model)
    optimizer = Flora(wrapped.named_parameters(), **case.flora)
    train(wrapped, optimizer)
    return {**trainable(model), **local_state(optimizer)}


def count_bytes(case: Case) -> tuple[int, int, dict[str, int]]:
    """FSDP2: reported bytes before the first step, measured after, and bytes by state name."""
    model = zoo.build(case.dtype)
    shard(model)
    optimizer = Flora(model.named_parameters(), **case.flora)
    reported = optimizer.report().state_bytes
    train(model, optimizer, steps=[0])
    assert optimizer.report().state_bytes == reported
    sizes = {n: v.nbytes for n, v in local_state(optimizer).items() if isinstance(v, Tensor)}
    return reported, sum(sizes.values()), sizes
