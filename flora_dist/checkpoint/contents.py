# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds: Flora's weights, states, settings and counters in canonical form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flora_dist.checkpoint.boxes import Boxes
from flora_dist.checkpoint.canonical import (
    element_boxes,
    elements_shape,
    entry_shape,
    owned_boxes,
)
from flora_dist.checkpoint.folder import Json, Manifest, TensorFacts
from flora_dist.core.parameters.trainable import Group, Trainable
from flora_dist.core.sketch.keys import canonical_name
from flora_dist.core.state.settings import KNOBS, check_settings, completed
from flora_dist.core.tiles import Tile
from flora_dist.flora import Flora

SETTINGS = (*KNOBS, "lr", "weight_decay", "maximize")
"""What a group's settings are."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelTensor:
    """What a rank holds of a tensor of the model that the optimizer does not: frozen, or a buffer.

    ``local`` are the elements of ``tiles``, contiguous in memory or one tile's.
    """

    name: str
    """Canonical."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    tiles: tuple[Tile, ...]
    local: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """One rank's part of a checkpoint."""

    tensors: Mapping[str, Boxes]
    """What the rank saves, by key."""
    parameters: dict[str, Json]
    """Shape of each parameter and buffer and, where there is state, its counters, by name."""
    groups: list[Json]
    """Names and settings of each group."""

    def facts(self) -> dict[str, TensorFacts]:
        """Shape and dtype of every tensor, by key."""
        return {
            key: TensorFacts(shape=boxes.shape, dtype=dtype_name(boxes.dtype))
            for key, boxes in self.tensors.items()
        }


def weight_key(name: str) -> str:
    """Where a parameter's or buffer's elements stand."""
    return f"model.{name}"


def state_key(name: str, entry: str) -> str:
    """Where a state tensor stands."""
    return f"optimizer.{name}.{entry}"


def dtype_name(dtype: torch.dtype) -> str:
    """As manifests have it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def gather(optimizer: Flora, others: Iterable[ModelTensor] = ()) -> Contents:
    """The state as it stands, sharing memory with it.

    Raises:
        ValueError: sketches of a step that was not taken yet, whose sums no checkpoint holds.
    """
    check_between_steps(optimizer)
    slots, others = optimizer.slots(), list(others)
    tensors = {weight_key(held.name): _elements(held) for held in others}
    for slot in slots:
        tensors[weight_key(slot.part.name)] = _weight(slot)
        tensors |= dict(_states(slot, optimizer.state.get(slot.tensor, {})))
    parameters: dict[str, Json] = {held.name: {"shape": list(held.shape)} for held in others}
    parameters |= {slot.part.name: _counters(slot, optimizer) for slot in slots}
    return Contents(
        tensors=tensors,
        parameters=parameters,
        groups=_groups(slots),
    )


def check_between_steps(optimizer: Flora) -> None:
    """Refuse to save or load between the micro-batches of a step."""
    if optimizer.gradients.is_open:
        raise ValueError(
            "a checkpoint must be taken between steps; sketches of gradients have come in since "
            "the last one, and their sums are not saved. Call it after optimizer.step(), or drop "
            "them with optimizer.zero_grad()."
        )


def others_of(model: nn.Module, optimizer: Flora) -> Iterator[ModelTensor]:
    """Frozen parameters that the optimizer does not hold, and persistent buffers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass alone its parameters are whole copies, which it will drop.
            module.reshard()
    known = {slot.part.name for slot in optimizer.slots()}
    own = {id(t) for group in optimizer.param_groups for t in group["params"]}
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model)):
        if id(tensor) in own:
            continue
        for part in optimizer.roster.parts_of(tensor, canonical_name(name)):
            if part.name not in known:
                known.add(part.name)
                yield ModelTensor(
                    name=part.name, shape=part.shape, tiles=part.tiles, local=part.weight()
                )


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that the model's own state dict has, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _elements(held: ModelTensor) -> Boxes:
    boxes = element_boxes(held.shape, held.tiles, held.local.detach())
    return Boxes.of(elements_shape(held.shape), held.local.dtype, boxes)


def _weight(slot: Trainable) -> Boxes:
    part = slot.part
    return _elements(
        ModelTensor(name=part.name, shape=part.shape, tiles=part.tiles, local=part.weight())
    )


def _states(slot: Trainable, state: dict[str, object]) -> Iterator[tuple[str, Boxes]]:
    if not slot.has_state(state):
        return
    own = slot.own_state(state)
    for entry in slot.entries:
        local = slot.part.local(own[entry.name])
        boxes = owned_boxes(slot.stepped, slot.geometry, entry, local)
        shape = entry_shape(entry, slot.geometry)
        yield state_key(slot.part.name, entry.name), Boxes.of(shape, local.dtype, boxes)


def _counters(slot: Trainable, optimizer: Flora) -> Json:
    state = optimizer.state.get(slot.tensor, {})
    counters: dict[str, Json] = {"shape": list(slot.part.shape)}
    if slot.has_state(state):
        own = slot.own_state(state)
        # Column shards are of this layout.
        counters |= {k: v for k, v in own.items() if isinstance(v, int) and k != "column_shards"}
    return counters


def _groups(slots: Sequence[Trainable]) -> list[Json]:
    """By identity of the group: engines take tensors out of theirs, slots know them still."""
    groups: dict[int, tuple[Group, list[Json]]] = {}
    for slot in slots:
        groups.setdefault(id(slot.group), (slot.group, []))[1].append(slot.part.name)
    return [{"names": names, "settings": settings_of(group)} for group, names in groups.values()]


def settings_of(group: Mapping[str, Any]) -> dict[str, Json]:
    """A group's settings as numbers and words, to be saved or as they were saved.

    Raises:
        ValueError: they are another optimizer's, or one has a value that no run can have: what is
            saved must load.
    """
    whole = completed(group)  # a setting younger than the checkpoint has its default of then
    if whole is None:
        raise ValueError(
            f"a group must have Flora's settings; this one has {sorted(group)[:4]} and others. "
            "Save it, or convert it, with the optimizer that made it."
        )
    values = {name: whole[name] for name in SETTINGS}
    values = {
        n: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for n, v in values.items()
    }
    try:
        check_settings(values)
    except ValueError as error:
        raise ValueError(f"a checkpoint's settings must be those of a run; {error}") from error
    return values


def saved_counters(manifest: Manifest) -> dict[str, dict[str, Json]]:
    """What ``parameters`` of a manifest says of each.

    Raises:
        ValueError: another writer's.
    """
    found = manifest.facts.get("parameters")
    if not isinstance(found, dict):
        raise _foreign("parameters")
    counters: dict[str, dict[str, Json]] = {}
    for name, own in found.items():
        if not isinstance(own, dict):
            raise _foreign(f"parameters.{name}")
        counters[name] = own
    return counters


def saved_groups(manifest: Manifest) -> list[tuple[list[str], dict[str, Json]]]:
    """Names and settings of each group of a manifest.

    Raises:
        ValueError: another writer's.
    """
    found = manifest.facts.get("groups")
    if not isinstance(found, list):
        raise _foreign("groups")
    groups = []
    for index, group in enumerate(found):
        names = group.get("names") if isinstance(group, dict) else None
        settings = group.get("settings") if isinstance(group, dict) else None
        if not isinstance(names, list) or not isinstance(settings, dict):
            raise _foreign(f"groups[{index}]")
        groups.append(([str(name) for name in names], settings))
    return groups


def _foreign(field: str) -> ValueError:
    return ValueError(
        f"a manifest must hold what flora_dist writes; {field} is something else. Load a "
        "checkpoint that flora_dist has written."
    )
