# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel: its reducer is built again without the parameters that are sketched.

Knows DDP's private names: what ``DistributedDataParallel.__setstate__`` does to build a reducer, in
torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flora_dist.core.layouts.replicated import whole
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.gradients.flow import Adapter, Source
from flora_dist.gradients.route import Route

_TESTED = "2.13.0"


def adapter_of_ddp(model: DistributedDataParallel, slots: Sequence[Trainable]) -> Adapter:
    """Gradients arrive whole on every rank and are averaged by one all-reduce of sketches.

    Raises:
        ValueError: a communication hook, mixed precision or delayed all-reduce, which work on the
            gradients that DDP reduces itself; nothing left for DDP.
    """
    _refuse(model)
    sketched = {id(slot.tensor) for slot in slots}
    if all(id(p) in sketched for p in model.module.parameters() if p.requires_grad):
        raise ValueError(
            "DDP's reducer needs a parameter of its own; every parameter would be sketched. Give "
            "one a group with rank=None, or use FSDP2."
        )
    group = model.process_group
    world_size = dist.get_world_size(group)
    sums = (group,) if world_size > 1 else ()
    return Adapter(
        sources=[_source(slot, sums, world_size) for slot in slots],
        install=partial(_leave_out, model),
        restore=partial(_take_back, model, frozenset(model.parameters_to_ignore)),
        # Of the last forward, as DDP's own reducer goes by it: False in no_sync().
        is_last=lambda: bool(model.require_forward_param_sync),
    )


def _source(slot: Trainable, sums: tuple[dist.ProcessGroup, ...], world_size: int) -> Source:
    tiles = whole(tuple(slot.tensor.shape))
    return Source(
        tensor=slot.tensor,
        visible=slot.tensor,
        tiles=tiles,
        route=Route(kept=(tiles,), sums=sums, divisor=world_size),
    )


def _refuse(model: DistributedDataParallel) -> None:
    for what, is_on in (
        ("a communication hook", bool(model._comm_hooks)),
        ("mixed_precision", model.mixed_precision is not None),
        ("delay_all_reduce_named_params", bool(model._delay_all_reduce_params)),
    ):
        if is_on:
            raise ValueError(
                f"compressed gradients under DDP do not go with {what}, which sees what DDP itself "
                "reduces. Build DistributedDataParallel without it, or use "
                "flora_dist.ddp.flora_hook."
            )


def _leave_out(model: DistributedDataParallel, sources: Sequence[Source]) -> None:
    sketched = {id(source.tensor) for source in sources}
    model.parameters_to_ignore = {*model.parameters_to_ignore, *_names_of(model, sketched)}
    _build_reducer(model)


def _take_back(model: DistributedDataParallel, ignored: frozenset[str]) -> None:
    model.parameters_to_ignore = set(ignored)
    _build_reducer(model)


def _names_of(model: DistributedDataParallel, chosen: set[int]) -> Iterator[str]:
    """As DDP writes them: a parameter of the root module begins with a dot."""
    for module_name, module in model.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in chosen:
                yield f"{module_name}.{name}"


def _build_reducer(ddp: DistributedDataParallel) -> None:
    model: Any = ddp  # torch's stubs do not know these methods
    try:
        parameters, expects_sparse = model._build_params_for_reducer()
        names = model._build_debug_param_to_name_mapping(parameters)
        model._ddp_init_helper(parameters, expects_sparse, names, model.static_graph)
        if model.static_graph:
            model.reducer._set_static_graph()
            model.logger._set_static_graph()
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            f"DDP must have the methods of torch {_TESTED}; in torch {torch.__version__}, "
            f"{error}. Use torch {_TESTED}, or flora_dist.ddp.flora_hook."
        ) from error
