# SPDX-License-Identifier: Apache-2.0
"""Bodies of ``test_fsdp1_variants.py``, on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from flora_dist import Flora, by_position, fsdp1
from flora_dist.core.sketch.keys import canonical_name
from tests.battery import zoo
from tests.battery.layouts import counted
from tests.battery.mutations import mutated
from tests.battery.oracle import STEPS, Case, distances, reference_of, trainable
from tests.battery.variants import Weights, my_batch
from tests.battery.wrapped import fsdp1_weights, wrap_in_fsdp1

SETTINGS: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}

# ---- variants that change nothing about the run


def train(
    model: FullyShardedDataParallel,
    optimizer: Flora,
    *,
    steps: Iterable[int] = range(STEPS),
    before_step: Callable[[int], None] = lambda _: None,
) -> Weights:
    fsdp1.attach(model, optimizer)
    for step in steps:
        optimizer.zero_grad()
        model(my_batch(step)).backward()
        before_step(step)
        optimizer.step()
    return fsdp1_weights(model)


def flora(model: nn.Module, case: Case) -> Flora:
    return Flora(model.named_parameters(), **case.flora)


def _wrapped(case: Case, **options: Any) -> Weights:
    model = wrap_in_fsdp1(zoo.build(case.dtype), **options)
    return train(model, flora(model, case))


def _hybrid(case: Case, strategy: ShardingStrategy) -> Weights:
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    return _wrapped(case, device_mesh=mesh, sharding_strategy=strategy)


def _groups_of_their_own(case: Case) -> Weights:
    """HYBRID_SHARD over process groups that every unit has made for itself."""
    rank, model = dist.get_rank(), zoo.build(case.dtype)

    def wrap(module: nn.Module) -> FullyShardedDataParallel:
        pairs = [[(0, 1), (2, 3)], [(0, 2), (1, 3)]]
        made = [[(ranks, dist.new_group(list(ranks))) for ranks in kind] for kind in pairs]
        mine = tuple(next(group for ranks, group in kind if rank in ranks) for kind in made)
        options = {**SETTINGS, "process_group": mine, "sharding_strategy": HYBRID}
        return FullyShardedDataParallel(module, **options)

    setattr(model, "up", wrap(model.up))  # noqa: B010
    wrapped = wrap(model)
    return train(wrapped, flora(wrapped, case))


def _flat_parameters(case: Case) -> Weights:
    """use_orig_params=False, which wants a unit of its own for what is frozen."""
    model = zoo.build(case.dtype)
    options = {**SETTINGS, "use_orig_params": False}
    setattr(model, "frozen", FullyShardedDataParallel(model.frozen, **options))  # noqa: B010
    wrapped = wrap_in_fsdp1(model, use_orig_params=False)
    return train(wrapped, flora(wrapped, case))


def _built_before_wrapping(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    optimizer = flora(model, case)
    return train(wrap_in_fsdp1(model), optimizer)


def _attached_twice(case: Case) -> Weights:
    """Also between steps, where a layout that is new would be refused."""
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    optimizer = flora(model, case)
    for step in range(STEPS):
        train(model, optimizer, steps=[step])
    return fsdp1_weights(model)


def _accumulated(case: Case, *, synced: bool) -> Weights:
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    optimizer = flora(model, case)
    fsdp1.attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        first, second, last = my_batch(step).chunk(3)
        for part in (first, second):
            if synced:
                (model(part) / 3).backward()
            else:
                with model.no_sync():
                    (model(part) / 3).backward()
        (model(last) / 3).backward()
        optimizer.step()
    return fsdp1_weights(model)


def _ignored(case: Case) -> Weights:
    """FSDP1 leaves the gradients of an ignored module to the user, who sums them here."""
    model = zoo.build(case.dtype)
    wrapped = FullyShardedDataParallel(model, ignored_states=[model.up], **SETTINGS)

    def mean(step: int) -> None:
        del step
        for parameter in model.up.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    return train(wrapped, flora(wrapped, case), before_step=mean)


def _reloaded(case: Case) -> Weights:
    """Half of the steps by another optimizer, from the first one's state."""
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    first, second = flora(model, case), flora(model, case)
    train(model, first, steps=range(5))
    fsdp1.attach(model, second)
    second.load_state_dict(first.state_dict())
    return train(model, second, steps=range(5, STEPS))


def _in_another_order_on_rank_1(case: Case) -> Weights:
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    named = list(model.named_parameters())
    groups = [named[:6], named[6:]]
    if dist.get_rank() == 1:
        groups = [named[6:][::-1], named[:6][::-1]]
    return train(model, Flora([{"params": group} for group in groups], **case.flora))


GRAD_OP, HYBRID = ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.HYBRID_SHARD
HYBRID_GRAD_OP = ShardingStrategy._HYBRID_SHARD_ZERO2
VARIANTS: dict[str, tuple[tuple[int, ...], Callable[[Case], Weights]]] = {
    "shard_grad_op": ((2, 3), partial(_wrapped, sharding_strategy=GRAD_OP)),
    "no_shard": ((2,), partial(_wrapped, sharding_strategy=ShardingStrategy.NO_SHARD)),
    "hybrid_shard": ((4,), partial(_hybrid, strategy=HYBRID)),
    "hybrid_shard, groups of their own": ((4,), _groups_of_their_own),
    "hybrid_shard_zero2": ((4,), partial(_hybrid, strategy=HYBRID_GRAD_OP)),
    "use_orig_params=False": ((2, 3), _flat_parameters),
    "optimizer built before wrapping": ((1, 2), _built_before_wrapping),
    "attached twice": ((2,), _attached_twice),
    "accumulation": ((2,), partial(_accumulated, synced=True)),
    "accumulation, no_sync": ((2,), partial(_accumulated, synced=False)),
    "an ignored module": ((2,), _ignored),
    "a loaded state": ((3,), _reloaded),
    "another order on rank 1": ((3,), _in_another_order_on_rank_1),
}
"""Name -> (ranks, how to train the zoo there); all must equal the plain reference run."""


def run(variant: str, case: Case, mutation: str = "") -> Weights:
    with mutated(mutation):
        return VARIANTS[variant][1](case)


def count(variant: str, case: Case) -> int:
    return counted(lambda: VARIANTS[variant][1](case))


# ---- runs with something of their own


def unnamed(case: Case) -> Weights:
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    return train(model, by_position(model.parameters(), **case.flora))


class Tied(nn.Module):
    """A parameter whose first name is not its smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.zebra, self.apple = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.apple.weight = self.zebra.weight


def tied_names(case: Case, options: dict[str, Any]) -> list[str]:
    model = FullyShardedDataParallel(Tied(), **{**SETTINGS, **options})
    optimizer = flora(model, case)
    fsdp1.attach(model, optimizer)
    return [row.name for row in optimizer.report().rows]


def clip(case: Case, max_norm: float) -> tuple[Weights, list[float]]:
    """Weights, and the norms before clipping."""
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    norms: list[float] = []

    def clip_now(step: int) -> None:
        del step
        norms.append(float(model.clip_grad_norm_(max_norm)))

    return train(model, flora(model, case), before_step=clip_now), norms


def mixed_precision(case: Case, reduce_dtype: torch.dtype) -> tuple[Weights, tuple[float, float]]:
    """bf16 compute, fp32 weights; distances to a reference fed with the reduced gradients."""
    plain = zoo.build(case.dtype)
    start = trainable(plain)
    reference = reference_of(case, start)
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    model = wrap_in_fsdp1(plain, mixed_precision=policy)

    def feed(step: int) -> None:
        del step
        whole = partial(FullyShardedDataParallel.summon_full_params, writeback=False)
        with whole(model, with_grads=True):
            named = {canonical_name(name): p for name, p in model.named_parameters()}
            reference.step({name: named[name].grad for name in start})

    weights = train(model, flora(model, case), before_step=feed)
    return weights, distances(start, dict(reference.weights), weights)


def count_bytes(case: Case) -> tuple[int, int]:
    """State as reported before the first step, and as it is after."""
    model = wrap_in_fsdp1(zoo.build(case.dtype))
    optimizer = flora(model, case)
    fsdp1.attach(model, optimizer)
    reported = optimizer.report().state_bytes
    train(model, optimizer, steps=[0])
    tensors = [v for own in optimizer.state.values() for v in own.values()]
    return reported, sum(v.nbytes for v in tensors if isinstance(v, Tensor))


# ---- what is refused


def _message(body: Callable[[], Any]) -> str:
    try:
        body()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def attach_with(mutation: str, case: Case) -> str:
    with mutated(mutation):
        return _message(lambda: _wrapped(case))


def step_unattached(case: Case, options: dict[str, Any], is_built_first: bool) -> tuple[str, int]:
    """What the first step says, and how much state there is then."""
    model = zoo.build(case.dtype)
    early = flora(model, case) if is_built_first else None
    model.frozen.weight.requires_grad_(True)  # use_orig_params=False wants all alike
    wrapped = wrap_in_fsdp1(model, **options)
    optimizer = early or flora(wrapped, case)
    wrapped(my_batch(0)).backward()
    return _message(optimizer.step), len(optimizer.state)


def refusals(case: Case) -> dict[str, str]:
    plain, turned = nn.Linear(8, 8), nn.Linear(8, 8)
    turned.weight = nn.Parameter(turned.weight.detach().t())
    wrapped = FullyShardedDataParallel(turned, **SETTINGS)
    flat = FullyShardedDataParallel(nn.Linear(8, 8), device_id=torch.device("cpu"))
    unsharded = FullyShardedDataParallel(
        nn.Linear(8, 8),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.NO_SHARD,
    )
    stranger = flora(plain, case)
    adam: Any = torch.optim.AdamW(flat.parameters())
    cases: dict[str, Callable[[], None]] = {
        "plain": lambda: fsdp1.attach(plain, stranger),
        "adam": lambda: fsdp1.attach(flat, adam),
        "stranger": lambda: fsdp1.attach(flat, stranger),
        "turned": lambda: fsdp1.attach(wrapped, flora(wrapped, case)),
        "unsharded": lambda: fsdp1.attach(unsharded, flora(unsharded, case)),
    }
    return {name: _message(body) for name, body in cases.items()}


def tensor_parallel(case: Case) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(8, 8))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    wrapped = FullyShardedDataParallel(model, device_mesh=mesh["data"], **SETTINGS)
    return _message(lambda: fsdp1.attach(wrapped, flora(wrapped, case)))


def ask_as_torch_does(use_orig_params: bool) -> tuple[list[str], int]:
    """What torch's ways to an optimizer's state say, and how many states its own has."""
    model = zoo.build(torch.float64)
    model.frozen.weight.requires_grad_(True)  # use_orig_params=False wants all alike
    wrapped = wrap_in_fsdp1(model, use_orig_params=use_orig_params)
    optimizer = Flora(wrapped.named_parameters(), rank=2, block=8)
    fsdp1.attach(wrapped, optimizer)
    train(wrapped, optimizer, steps=range(1))
    messages = []
    for ask in (
        FullyShardedDataParallel.optim_state_dict,
        FullyShardedDataParallel.full_optim_state_dict,
        get_state_dict,
        get_optimizer_state_dict,
    ):
        with pytest.raises(ValueError, match="under FSDP1") as refused:
            ask(wrapped, optimizer)
        messages.append(str(refused.value))
    return messages, len(optimizer.state_dict()["state"])
