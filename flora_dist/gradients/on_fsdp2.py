# SPDX-License-Identifier: Apache-2.0
"""FSDP2: where full gradients arrive before ``fully_shard`` reduces them, and what must not be set.

A module that is unsharded shows the parameter whose ``.grad`` autograd fills; FSDP2 keeps that
object and only resizes its memory. A gradient taken away there is neither kept nor reduced by
FSDP2. Private names, of torch 2.13.0, are read for what is refused alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flora_dist.core.layouts.dtensor import TilesAlong, shard_axes, tiles_at
from flora_dist.core.layouts.replicated import whole
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.gradients.flow import Adapter, Source
from flora_dist.gradients.on_plain import source_at_parameter
from flora_dist.gradients.own_memory import OwnMemory
from flora_dist.gradients.route import Route

_TESTED = "2.13.0"


def adapter_of_shards(model: nn.Module, slots: Sequence[Trainable]) -> Adapter:
    """FSDP2 reduces full gradients; what is taken is this rank's shard of the mean."""
    own = OwnMemory(model)
    return Adapter(
        sources=[source_at_parameter(slot) for slot in slots],
        install=own.install,
        restore=own.restore,
    )


def adapter_of_unsharded(model: nn.Module, slots: Sequence[Trainable]) -> Adapter:
    """Gradients are taken whole, before FSDP2 sees them; costs one all-gather of the weights.

    Raises:
        ValueError: settings of FSDP2 that the sketches would not follow, parameters on meta.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    _check(modules)
    if any(slot.tensor.is_meta for slot in slots):
        raise ValueError(
            "parameters must have memory when gradients are attached; some are on the meta device. "
            "Call model.to_empty(device=...) and initialise them first."
        )
    gathered = dict(_gathered(modules))
    divisors = dict(_divisors(modules))
    return Adapter(
        sources=[_source(slot, gathered, divisors) for slot in slots],
        watched=[(group, name) for group in _param_groups(modules) for name in _REFUSED],
        check=partial(_check, modules),
        is_last=partial(_reduces, modules),
    )


def _source(
    slot: Trainable, gathered: Mapping[int, Tensor], divisors: Mapping[int, float | None]
) -> Source:
    sharded = slot.tensor
    tensor = gathered.get(id(sharded))
    if tensor is None:  # plain or tensor parallel, and in no FSDP2 module
        return source_at_parameter(slot)
    assert isinstance(sharded, DTensor)
    axes = _data_axes(slot.part.name, sharded, tensor)
    mesh, cutting = sharded.device_mesh, [axis for axis in shard_axes(sharded) if axis in axes]
    factor = divisors[id(sharded)]
    route = Route(
        kept=TilesAlong(sharded, cutting[0]) if cutting else (tiles_at(sharded),),
        scatter=mesh.get_group(cutting[0]) if cutting else None,
        sums=tuple(
            mesh.get_group(axis) for axis in axes if axis not in cutting and mesh.size(axis) > 1
        ),
        divisor=math.prod(mesh.size(axis) for axis in axes) if factor is None else factor,
    )
    is_parallel = isinstance(tensor, DTensor)
    return Source(
        tensor=tensor,
        visible=sharded,
        tiles=tiles_at(tensor) if isinstance(tensor, DTensor) else whole(tuple(tensor.shape)),
        route=route,
        is_partial=is_parallel,
    )


def _data_axes(name: str, sharded: DTensor, tensor: Tensor) -> tuple[int, ...]:
    """FSDP2 puts its own axes before those of tensor parallelism."""
    others = tensor.device_mesh.ndim if isinstance(tensor, DTensor) else 0
    axes = tuple(range(sharded.device_mesh.ndim - others))
    if sum(axis in axes for axis in shard_axes(sharded)) > 1:
        raise ValueError(
            f"FSDP2 must shard a parameter over one axis of its mesh; {name!r} has the placements "
            f'{sharded.placements}. Use gradients="dense".'
        )
    return axes


def _gathered(modules: Sequence[FSDPModule]) -> Iterator[tuple[int, Tensor]]:
    """For each sharded parameter, the one that stands in its module while it is unsharded."""
    for module in modules:
        assert isinstance(module, nn.Module)
        places = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if isinstance(parameter, DTensor)
        ]
        module.unshard()
        try:
            for owner, name, sharded in places:
                unsharded = owner._parameters[name]
                if unsharded is not None and unsharded is not sharded:
                    yield id(sharded), unsharded
        finally:
            module.reshard()


# ---- FSDP2's private names


def _param_groups(modules: Sequence[FSDPModule]) -> Iterator[object]:
    for module in modules:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before torch 2.13 a module had one group, or none
            groups = [group for group in [state._fsdp_param_group] if group is not None]
        yield from groups


def _reduces(modules: Sequence[FSDPModule]) -> bool:
    """Whether neither gradient syncs nor HSDP's all-reduces have been turned off."""
    return all(
        group.reduce_grads and group.all_reduce_grads  # type: ignore[attr-defined]
        for group in _param_groups(modules)
    )


def _divisors(modules: Sequence[FSDPModule]) -> Iterator[tuple[int, float | None]]:
    """What ``set_gradient_divide_factor`` has set for each sharded parameter."""
    for group in _param_groups(modules):
        for parameter in group.fsdp_params:  # type: ignore[attr-defined]
            yield id(parameter.sharded_param), group.gradient_divide_factor  # type: ignore[attr-defined]


_REFUSED = {
    # Full gradients of zeros would be made and reduced. New in torch 2.13.
    "reduce_scatter_unused_params": "set_reduce_scatter_unused_params",
    # It would see what FSDP2 itself reduces alone.
    "_all_reduce_hook": "set_all_reduce_hook",
}
"""An attribute of a group of parameters that must not be set, and what sets it."""


def _check(modules: Sequence[FSDPModule]) -> None:
    try:
        groups = [(each, each._all_reduce_hook) for each in _param_groups(modules)]  # type: ignore[attr-defined]
    except AttributeError as error:
        raise RuntimeError(
            f"FSDP2 must have the attributes of torch {_TESTED}; in torch {torch.__version__}, "
            f"{error}. Use torch {_TESTED}."
        ) from error
    for group, _ in groups:
        for attribute, call in _REFUSED.items():
            if getattr(group, attribute, None):
                raise ValueError(
                    f"compressed gradients under FSDP2 do not go with {call}(), which works on "
                    "the gradients that FSDP2 reduces. Do not call it."
                )
