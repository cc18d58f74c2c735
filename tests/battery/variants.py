# SPDX-License-Identifier: Apache-2.0
"""Ways in which people really use DDP and FSDP2, all the same run; what its bodies share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flora_dist import Flora
from flora_dist.core.sketch.keys import canonical_name
from tests.battery import zoo
from tests.battery.oracle import SAMPLES, STEPS, Case, reference_of, trainable

Weights = dict[str, Tensor]
Gradients = dict[str, Tensor | None]


def shard(model: zoo.Zoo, **options: Any) -> None:
    """FSDP2 over all ranks: four groups of their own, the rest with the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.up, model.down, model.conv, model.single):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def my_batch(step: int) -> Tensor:
    return zoo.share(zoo.batch(step, SAMPLES), dist.get_rank(), dist.get_world_size())


def train(
    model: nn.Module,
    optimizer: Flora,
    *,
    steps: Iterable[int] = range(STEPS),
    before_step: Callable[[int], None] = lambda _: None,
) -> Weights:
    """Steps on this rank's share of the batches; returns the whole weights."""
    for step in steps:
        optimizer.zero_grad()
        model(my_batch(step)).backward()
        before_step(step)
        optimizer.step()
    return whole_weights(model)


def whole_weights(model: nn.Module) -> Weights:
    return {canonical_name(n): whole(w) for n, w in trainable(model).items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_state(optimizer: Flora) -> dict[str, Any]:
    """Everything that the optimizer keeps on this rank, as plain copies, by name."""
    kept = {}
    for group in optimizer.param_groups:
        for name, tensor in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(tensor, {}).items():
                local = value.to_local() if isinstance(value, DTensor) else value
                kept[f"{canonical_name(name)}.{key}"] = (
                    local.detach().clone() if isinstance(local, Tensor) else local
                )
    return kept


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names under which two dicts of tensors and numbers differ in any bit."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    return [name for name, value in ours.items() if not _is_same(value, theirs[name])]


def _is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return bool(ours == theirs)


# ---- the reference, with whatever happens on the way


def follow(
    case: Case,
    model: nn.Module,
    *,
    change: Callable[[int, Gradients], Gradients] = lambda _, gradients: gradients,
) -> tuple[Weights, Weights]:
    """The reference's weights before and after a run of ``model`` on whole batches.

    ``change`` gives the gradients that the optimizer is to see at a step.
    """
    start = trainable(model)
    reference = reference_of(case, start)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(STEPS):
        model.zero_grad()
        model(zoo.batch(step, SAMPLES)).backward()
        reference.step(change(step, {name: p.grad for name, p in parameters.items()}))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return start, dict(reference.weights)


# ---- variants that change nothing about the run


def _sharded(case: Case, **options: Any) -> Weights:
    model = zoo.build(case.dtype)
    shard(model, **options)
    return train(model, Flora(model.named_parameters(), **case.flora))


def _from_meta(case: Case, *, optimizer_first: bool) -> Weights:
    # Incident: weak references to parameters in the optimizer made to_empty() fail.
    model = zoo.build(case.dtype).to("meta")
    model.head.weight = model.embed.weight  # to("meta") makes new parameters
    shard(model)
    early = Flora(model.named_parameters(), **case.flora) if optimizer_first else None
    model.to_empty(device="cpu")
    values = zoo.build(case.dtype).state_dict()
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
    return train(model, early or Flora(model.named_parameters(), **case.flora))


def _tied_apart(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    fully_shard([model.embed, model.head], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    shard(model)
    return train(model, Flora(model.named_parameters(), **case.flora))


def _wrapped(case: Case, wrap: Callable[[nn.Module], nn.Module]) -> Weights:
    model = zoo.build(case.dtype)
    for name in ("up", "down", "single"):
        setattr(model, name, wrap(getattr(model, name)))
    shard(model)
    names = [name for name, _ in model.named_parameters()]
    assert any(canonical_name(name) != name for name in names), names
    return train(model, Flora(model.named_parameters(), **case.flora))


def _compiled_in_place(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    for layer in (model.up, model.down):
        layer.compile(backend="aot_eager")
    shard(model)
    return train(model, Flora(model.named_parameters(), **case.flora))


def _accumulated(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    shard(model)
    optimizer = Flora(model.named_parameters(), **case.flora)
    for step in range(STEPS):
        optimizer.zero_grad()
        halves = my_batch(step).chunk(2)
        for index, half in enumerate(halves):
            model.set_requires_gradient_sync(index == len(halves) - 1)
            (model(half) / len(halves)).backward()
        optimizer.step()
    return whole_weights(model)


def _swapped(case: Case) -> Weights:
    """Accelerate: the optimizer is made first, then its parameters are replaced by DTensors."""
    model = zoo.build(case.dtype)
    optimizer = Flora(model.named_parameters(), **case.flora)
    optimizer.report()  # must not fix what the optimizer thinks it holds
    wanted = [list(group["param_names"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # accelerate frees the whole parameters so
        group["params"] = [torch.empty(1) for _ in group["params"]]
    shard(model)
    sharded = dict(model.named_parameters())
    for group, names in zip(optimizer.param_groups, wanted, strict=True):
        group["params"] = [sharded[name] for name in names]
    weights = train(model, optimizer)
    held = {id(parameter) for parameter in model.parameters()}
    stale = [tuple(tensor.shape) for tensor in optimizer.state if id(tensor) not in held]
    assert not stale, stale
    return weights


def _in_another_order_on_rank_1(case: Case) -> Weights:
    """Groups and parameters in different order: messages must still fit together."""
    model = zoo.build(case.dtype)
    shard(model)
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if p.ndim > 1]
    vectors = [(n, p) for n, p in named if p.ndim <= 1]
    groups = [matrices, vectors]
    if dist.get_rank() == 1:
        groups = [vectors[::-1], matrices[::-1]]
    optimizer = Flora([{"params": group} for group in groups], **case.flora)
    return train(model, optimizer)


def _ddp(case: Case, **options: Any) -> Weights:
    model = zoo.build(case.dtype)
    wrapped = DistributedDataParallel(model, **options)
    train(wrapped, Flora(wrapped.named_parameters(), **case.flora))
    return whole_weights(model)


def _ddp_accumulated(case: Case) -> Weights:
    model = zoo.build(case.dtype)
    wrapped = DistributedDataParallel(model)
    optimizer = Flora(wrapped.named_parameters(), **case.flora)
    for step in range(STEPS):
        optimizer.zero_grad()
        first, last = my_batch(step).chunk(2)
        with wrapped.no_sync():
            (wrapped(first) / 2).backward()
        (wrapped(last) / 2).backward()
        optimizer.step()
    return whole_weights(model)


VARIANTS: dict[str, Callable[[Case], Weights]] = {
    "meta, optimizer before to_empty": partial(_from_meta, optimizer_first=True),
    "meta, optimizer after to_empty": partial(_from_meta, optimizer_first=False),
    "cpu offload": partial(_sharded, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "kept after forward": partial(_sharded, reshard_after_forward=False),
    "tied modules in one group": _tied_apart,
    "torch.compile of blocks": partial(_wrapped, wrap=partial(torch.compile, backend="aot_eager")),
    "blocks compiled in place": _compiled_in_place,
    "activation checkpointing": partial(_wrapped, wrap=checkpoint_wrapper),
    "accumulation": _accumulated,
    "parameters swapped after construction": _swapped,
    "another order on rank 1": _in_another_order_on_rank_1,
    "ddp, bucket views": partial(_ddp, gradient_as_bucket_view=True),
    "ddp, no_sync": _ddp_accumulated,
}
"""Name -> how to train the zoo there; all must equal the plain reference run."""


def run(variant: str, case: Case) -> Weights:
    return VARIANTS[variant](case)
