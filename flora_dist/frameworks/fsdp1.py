# SPDX-License-Identifier: Apache-2.0
"""FSDP1: where ``FullyShardedDataParallel`` keeps each parameter, told to Flora as flat spans.

The only file that knows its private names, but for the mark in
``core/parameters/registry.py``. Read in torch 2.13.0; ``attach`` proves on every model that the map
built from them still holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from flora_dist.core.comm.groups import GroupReducer
from flora_dist.core.layouts.flat import FlatLayout, Span, cut_line
from flora_dist.core.layouts.replicated import NamedLayout
from flora_dist.core.parameters.names import names_of
from flora_dist.core.parameters.registry import is_marked_by_fsdp1
from flora_dist.core.protocols import Layout
from flora_dist.core.sketch.keys import canonical_name
from flora_dist.flora import Flora
from flora_dist.frameworks.spans import Partition, check_partitions

_TESTED = "2.13.0"
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_FORMS = {
    ("torch.distributed.checkpoint.state_dict", "_get_optim_state_dict"),
    (_FSDP1, "optim_state_dict"),
    (_FSDP1, "full_optim_state_dict"),
    (_FSDP1, "sharded_optim_state_dict"),
}
"""What asks an optimizer for its state to lay it out as FSDP1 does."""
Walk = Mapping[nn.Module, tuple[int, str]]
"""Place and name of each module in the model, as its walk first meets them."""
_attached: WeakKeyDictionary[Flora, WeakSet[nn.Module]] = WeakKeyDictionary()


def attach(model: nn.Module, optimizer: Flora) -> None:
    """Tell Flora which elements of each parameter this rank holds; a second call does nothing.

    Call it on every rank, after wrapping and before the first step. With ``use_orig_params=True``
    the optimizer may be built before or after wrapping; with False after, and all parameters of a
    unit then have the settings of its flat parameter. FSDP1 does not sum the gradients of ignored
    parameters: they are stepped as plain tensors, by what each rank has.

    Args:
        model: is a ``FullyShardedDataParallel``, or holds some.
        optimizer: holds parameters of the model, some or all.

    Raises:
        TypeError: the optimizer is not Flora.
        ValueError: what would be computed wrong, an optimizer of another model, or ranks that
            differ.
        RuntimeError: this version of torch lays parameters out in another way.
    """
    if not isinstance(optimizer, Flora):
        raise TypeError(
            f"attach needs a Flora; got {type(optimizer).__name__}. Pass the optimizer inside, if "
            "a framework has wrapped it."
        )
    modules = [m for m in FullyShardedDataParallel.fsdp_modules(model) if m._handle is not None]
    if not modules:
        raise ValueError(
            "the model must hold FullyShardedDataParallel modules with parameters; it holds none. "
            "Wrap it first. Plain models, DDP and FSDP2 need no attach()."
        )
    known = _attached.setdefault(optimizer, WeakSet())
    fresh = [module for module in modules if module not in known]
    if not fresh:
        return
    try:
        units = _units(fresh, model, optimizer)
    except AttributeError as error:
        raise RuntimeError(
            f"FSDP1's flat parameters must have the attributes of torch {_TESTED}; in torch "
            f"{torch.__version__}, {error}. Use torch {_TESTED}."
        ) from error
    partitions = [_partition(unit) for unit in units if unit.group is not None]
    check_partitions(partitions, framework=f"torch {torch.__version__}", tested=_TESTED)
    for layout in _layouts(units):
        optimizer.attach_layout(layout)
    optimizer.check_consistency(_peers(modules[0]))
    if partitions and not known:
        optimizer.register_state_dict_pre_hook(_refuse_fsdp1s_form)
    known.update(fresh)


def _refuse_fsdp1s_form(optimizer: torch.optim.Optimizer) -> None:
    """Refuse ``state_dict()`` where FSDP1 asks for it, which would fail deep inside.

    It takes every state tensor for elements of its parameter, to lay them out as it does weights.
    """
    del optimizer
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        place = (frame.f_globals.get("__name__"), frame.f_code.co_name)
        if place in _FORMS:
            raise ValueError(
                "under FSDP1 torch takes an optimizer's state for elements of its parameters; "
                f"Flora's are sketches and means, so {place[1]}() of {place[0]} cannot gather it. "
                "Use flora_dist.checkpoint.save and load, or keep each rank's own "
                "optimizer.state_dict()."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """The parameters that one module shards together."""

    flat: Tensor
    """This rank's share of all of them in one line."""
    views: tuple[Tensor, ...]
    """This rank's share of each, as FSDP1 itself finds it."""
    spans: tuple[Span, ...]
    """The same share as elements of the parameter and of ``flat``."""
    is_flat: bool
    """The optimizer holds ``flat`` (use_orig_params=False), not the views."""
    rank: int
    group: dist.ProcessGroup | None
    """The ranks that share the parameters; None (NO_SHARD): each has everything."""

    @property
    def stepped(self) -> tuple[Tensor, ...]:
        return (self.flat,) if self.is_flat else self.views


def _partition(unit: _Unit) -> Partition:
    assert unit.group is not None
    return Partition(
        flat=unit.flat,
        param_group=0,  # views stand in any group; nothing is taken out of them
        process_group=unit.group,
        spans=unit.spans,
        weights=[_reader(view) for view in unit.views],
    )


def _reader(view: Tensor) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        del start, stop  # the view's own length is part of the proof
        return view.detach()

    return read


def _layouts(units: Iterable[_Unit]) -> tuple[Layout, Layout]:
    flat, whole = FlatLayout(), list[tuple[str, Tensor, Tensor]]()
    reducers: dict[tuple[int, ...], GroupReducer] = {}
    for unit in units:
        if unit.group is None:
            pairs = zip(unit.spans, unit.views, strict=True)
            whole += [(span.name, view, view) for span, view in pairs]
            continue
        # HYBRID_SHARD may make groups for every unit; of the same ranks, one message serves all.
        ranks = tuple(dist.get_process_group_ranks(unit.group))
        reducer = reducers.setdefault(ranks, GroupReducer(group=unit.group))
        if unit.is_flat:
            flat.add(unit.flat, unit.spans, rank=unit.rank, reducer=reducer)
            continue
        for span, view in zip(unit.spans, unit.views, strict=True):
            flat.add_view(view, replace(span, offset=0), rank=unit.rank, reducer=reducer)
    return flat, NamedLayout(whole)


# ---- FSDP1's private names


def _peers(module: Any) -> list[dist.ProcessGroup]:
    """Who trains the model: those that share it and, under HYBRID_SHARD, its replicas."""
    replicas = getattr(module, "_inter_node_pg", None)
    return [module._handle.process_group, *([] if replicas is None else [replicas])]


def _units(
    modules: Iterable[FullyShardedDataParallel], model: nn.Module, optimizer: Flora
) -> list[_Unit]:
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    given = dict(zip(map(id, tensors), names_of(optimizer.param_groups), strict=True))
    walk = {module: (place, name) for place, (name, module) in enumerate(model.named_modules())}
    units = [_unit(module._handle, walk, given) for module in modules]
    if not any(id(tensor) in given for unit in units for tensor in unit.stepped):
        raise ValueError(
            f"the optimizer must hold parameters of the model; none of its {len(tensors)} tensors "
            "is one. Pass model.named_parameters(), after wrapping if use_orig_params=False."
        )
    return units


def _unit(handle: Any, walk: Walk, given: Mapping[int, str]) -> _Unit:
    flat, uses_views = handle.flat_param, handle._use_orig_params
    names = list(_names(flat, walk))
    _refuse(handle, names)
    views = flat._params if uses_views else list(_narrow(flat))
    if uses_views:  # as in plain training: the name, or the position, that Flora was given
        names = [given.get(id(view), name) for view, name in zip(views, names, strict=True)]
    is_sharded = handle.uses_sharded_strategy
    rank, world_size = (handle.rank, handle.world_size) if is_sharded else (0, 1)
    spans = cut_line(
        list(zip(names, map(tuple, flat._shapes), strict=True)),
        offsets=list(_offsets(flat)),
        size=flat._sharded_size.numel(),
        rank=rank,
        world_size=world_size,
    )
    return _Unit(
        flat=flat,
        views=tuple(views),
        spans=spans,
        is_flat=not uses_views,
        rank=rank,
        group=handle.process_group if is_sharded else None,
    )


def _names(flat: Any, walk: Walk) -> Iterator[str]:
    """Each parameter's name in the model; of tied ones the first, as named_parameters() has it."""
    for info in flat._param_infos:
        owners = [(info.module, info.param_name)]
        for tied in flat._shared_param_infos:
            if (tied.prim_module, tied.prim_param_name) == owners[0]:
                owners.append((tied.module, tied.param_name))
        module, name = min(owners, key=lambda owner: walk[owner[0]][0])
        yield canonical_name(f"{walk[module][1]}.{name}")


def _narrow(flat: Any) -> Iterator[Tensor]:
    for info in flat._shard_param_infos:
        start, size = (info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0)
        yield flat.detach()[start : start + size]


def _offsets(flat: Any) -> Iterator[int]:
    """Of each parameter in the line of all ranks, where padding stands between them."""
    start = 0
    for size, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            yield start
        start += size


def _refuse(handle: Any, names: Iterable[str]) -> None:
    flat = handle.flat_param
    if not all(map(is_marked_by_fsdp1, flat._params if handle._use_orig_params else [flat])):
        raise RuntimeError(
            "FSDP1 must mark what it has flattened, or unattached optimizers go unnoticed; torch "
            f"{torch.__version__} does not. Use a version that was tested: {_TESTED}."
        )
    if not handle._use_orig_params and not handle.uses_sharded_strategy:
        raise ValueError(
            "use_orig_params=False must go with sharding; under NO_SHARD (which FSDP1 also uses "
            "on one process) there is no partition to attach. Set use_orig_params=True."
        )
    each = zip(names, flat._param_extensions, flat._contiguities, strict=True)
    for name, extension, is_contiguous in each:
        if extension is not None:
            raise ValueError(
                "under FSDP1 parameters must be plain tensors before wrapping; "
                f"{name!r} is a DTensor (tensor parallelism). Use FSDP2 (fully_shard)."
            )
        if not is_contiguous:
            raise ValueError(
                "under FSDP1 parameters must be contiguous, since it cuts them as they lie in "
                f"memory; {name!r} is not. Make it contiguous before wrapping."
            )
