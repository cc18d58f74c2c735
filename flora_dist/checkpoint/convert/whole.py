# SPDX-License-Identifier: Apache-2.0
"""A run's whole state on one process, as conversions read and write it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flora_dist.checkpoint import owners
from flora_dist.checkpoint.boxes import Boxes
from flora_dist.checkpoint.canonical import Box, entry_shape
from flora_dist.checkpoint.contents import (
    Contents,
    saved_counters,
    saved_groups,
    state_key,
    weight_key,
)
from flora_dist.checkpoint.folder import Json, Manifest, TensorFacts
from flora_dist.checkpoint.loading import read
from flora_dist.checkpoint.safe_load import check_memory
from flora_dist.checkpoint.saving import write
from flora_dist.checkpoint.stored import tiles_exactly
from flora_dist.checkpoint.target import target_of
from flora_dist.core.state.settings import completed, config_of
from flora_dist.core.state.spec import geometry_of, state_tensors

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class Whole:
    """Canonical tensors on the CPU, and the numbers beside them."""

    step: int
    tensors: Mapping[str, Tensor]
    """By key, in canonical shapes."""
    shapes: Mapping[str, Shape]
    """Of parameters and buffers as the model has them, by name; the order is the model's."""
    counters: Mapping[str, dict[str, Json]]
    """Of each parameter's state, by name; none where there is no state."""
    groups: list[tuple[list[str], dict[str, Json]]]
    """Names and settings of the optimizer's groups."""
    extra: dict[str, Json]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of tied parameters, as far as they are known."""
    left_out: tuple[str, ...] = ()
    """What the source had, and no checkpoint of ours keeps."""


def read_whole(path: Path) -> Whole:
    """Read a canonical checkpoint, or the newest of a folder, files verified.

    Raises:
        ValueError: naming file and field.
    """
    opened: list[tuple[Manifest, dict[str, Tensor]]] = []

    def fit(manifest: Manifest) -> _Room:
        check_memory(sum(facts.bytes for facts in manifest.files.values()), f"'{path}'")
        opened.append((manifest, {key: _empty(facts) for key, facts in manifest.tensors.items()}))
        return _Room(tensors={key: _boxes(tensor) for key, tensor in opened[-1][1].items()})

    loaded = read(path, fit)
    manifest, tensors = opened[0]
    counters = saved_counters(manifest)
    shapes = {
        name: _shape_of(counters.get(name, {}), tensor) for name, tensor in _named_weights(tensors)
    }
    return Whole(
        step=loaded.step,
        tensors=tensors,
        shapes=shapes,
        counters={n: {k: v for k, v in c.items() if k != "shape"} for n, c in counters.items()},
        groups=saved_groups(manifest),
        extra=loaded.extra,
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Whole weights and buffers of a canonical checkpoint, or of a folder's newest, by name.

    As the model has them; the files are verified, and of the state only they are read.

    Raises:
        ValueError: naming file and field.
    """
    found: dict[str, Tensor] = {}

    def fit(manifest: Manifest) -> _Room:
        counters = saved_counters(manifest)
        facts = dict(_named_weights(manifest.tensors))
        check_memory(sum(each.bytes for each in manifest.files.values()), f"'{path}'")
        own = {name: _empty(each) for name, each in facts.items()}
        found.update(
            (name, tensor.view(_shape_of(counters.get(name, {}), tensor)))
            for name, tensor in own.items()
        )
        return _Room(tensors={weight_key(name): _boxes(tensor) for name, tensor in own.items()})

    read(path, fit)
    return found


def _shape_of(counters: Mapping[str, Json], tensor: Tensor) -> Shape:
    """As the model has it; the canonical one where another optimizer than Flora was saved."""
    saved = counters.get("shape")
    if saved is None:
        return tuple(tensor.shape)
    sizes = saved if isinstance(saved, list) else [saved]
    shape = tuple(size for size in sizes if isinstance(size, int) and size >= 0)
    if len(shape) != len(sizes) or math.prod(shape) != tensor.numel():
        raise ValueError(
            f"a manifest's shapes must be those of its tensors; one of {tensor.numel()} elements "
            f"has {saved!r}. Load another checkpoint."
        )
    return shape


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What is read, and stays where it is."""

    tensors: dict[str, Boxes]

    def put_in_place(self) -> None:
        """Nothing: the tensors are the result."""


def _empty(facts: TensorFacts) -> Tensor:
    dtype = getattr(torch, facts.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(  # noqa: TRY004 - a file's fault
            f"a manifest's tensors must have dtypes of torch; one has {facts.dtype!r}. Load "
            "another checkpoint."
        )
    return torch.empty(facts.shape, dtype=dtype)


def _boxes(tensor: Tensor) -> Boxes:
    shape = tuple(tensor.shape)
    return Boxes.of(shape, tensor.dtype, [Box(offsets=(0,) * len(shape), values=tensor)])


def _named_weights(tensors: Mapping[str, T]) -> Iterable[tuple[str, T]]:
    prefix = weight_key("")
    return (
        (key.removeprefix(prefix), tensor)
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    )


# ---- writing


def write_whole(whole: Whole, folder: Path) -> Path:
    """Write a canonical checkpoint into a folder of checkpoints; its path.

    Raises:
        ValueError: the disk, or an extra that is no JSON.
    """
    contents = Contents(
        tensors={key: _boxes(tensor) for key, tensor in whole.tensors.items()},
        parameters={
            name: {"shape": list(shape), **whole.counters.get(name, {})}
            for name, shape in whole.shapes.items()
        },
        groups=[{"names": list(own), "settings": settings} for own, settings in whole.groups],
    )
    target = target_of(folder, step=whole.step, extra=whole.extra)
    return write(contents, target)


def write_file(whole: Whole, file: Path) -> Path:
    """Write ``{"model": a full state dict, "optimizer": Flora.state_dict() of a plain run}``.

    For ``torch.load(file, weights_only=True)``; ``extra`` and the step stand beside them.
    """
    weights = dict(_named_weights(whole.tensors))
    model = {name: weights[name].view(shape) for name, shape in whole.shapes.items()}
    model |= {alias: model[name] for alias, name in whole.aliases.items()}
    content = {
        "model": model,
        "optimizer": _optimizer_state(whole),
        "step": whole.step,
        "extra": whole.extra,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two conversions to one file would write into each other.
    partial = file.with_name(f".{file.name}.{owners.new_token()}.partial")
    try:
        with partial.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        return partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _optimizer_state(whole: Whole) -> dict[str, Any]:
    order = {name: place for place, name in enumerate(whole.shapes)}
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for names, settings in whole.groups:
        first = sum(len(group["params"]) for group in groups)
        own = sorted(names, key=order.__getitem__)  # partitions may have another order
        if any(name[0] == "#" for name in own):
            own = sorted(names, key=lambda name: int(name[1:]))
        ids = list(range(first, first + len(own)))
        group: dict[str, Any] = {**settings, "params": ids}
        if not any(name[0] == "#" for name in own):
            group["param_names"] = own
        groups.append(group)
        for place, name in zip(ids, own, strict=True):
            if state := _state(whole, name, settings):
                states[place] = state
    return {"state": states, "param_groups": groups}


def _state(whole: Whole, name: str, settings: Mapping[str, Json]) -> dict[str, Any]:
    counters = whole.counters.get(name, {})
    if "step" not in counters:
        return {}
    config = config_of(settings)
    entries = state_tensors(geometry_of(name, whole.shapes[name], config), config)
    tensors = {e.name: whole.tensors[state_key(name, e.name)].view(e.shape) for e in entries}
    return {**tensors, **counters}


# ---- putting together


def check_entry(value: object, shape: Shape, what: str, where: Path) -> Tensor:
    """A state tensor, unless it is missing or of another shape.

    Raises:
        ValueError: naming it.
    """
    if isinstance(value, Tensor) and tuple(value.shape) == shape:
        return value
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"{what} in '{where}' must be a tensor of shape {shape}; it is {found}. Was it saved by "
        "another optimizer, or with columns sharded?"
    )


def check_settings(group: Mapping[str, Any], where: Path) -> None:
    """Refuse a group of another optimizer.

    Raises:
        ValueError: naming what it lacks.
    """
    if completed(group) is None or "params" not in group:
        raise ValueError(
            f"an optimizer's groups must have Flora's settings; in '{where}' one has "
            f"{sorted(map(str, group))[:4]} and others. Only checkpoints of Flora can be converted."
        )


def counters_of(state: Mapping[str, Any]) -> dict[str, Json]:
    """The numbers of a parameter's state, but for those that stand for its layout."""
    return {k: v for k, v in state.items() if isinstance(v, int) and k != "column_shards"}


def canonical_states(
    name: str, shape: Shape, group: Mapping[str, Any], state: Mapping[str, Any], where: Path
) -> dict[str, Tensor]:
    """A whole parameter's state tensors by key; none where it has no state.

    Raises:
        ValueError: one is missing or of another shape.
    """
    if "step" not in state:
        return {}
    config = config_of(group)
    geometry = geometry_of(name, shape, config)
    found = {}
    for entry in state_tensors(geometry, config):
        whole = check_entry(state.get(entry.name), entry.shape, f"{entry.name} of {name!r}", where)
        found[state_key(name, entry.name)] = whole.reshape(entry_shape(entry, geometry))
    return found


class Assembly:
    """Canonical tensors that are put together from the boxes of many ranks."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._filled: dict[str, list[tuple[Shape, Shape]]] = {}

    def add(self, key: str, shape: Shape, dtype: torch.dtype, boxes: Iterable[Box]) -> None:
        """Put in what one rank holds of a tensor and no other does."""
        tensor = self._tensors.setdefault(key, torch.empty(shape, dtype=dtype))
        for box in boxes:
            target = tensor
            for dim, (start, size) in enumerate(zip(box.offsets, box.values.shape, strict=True)):
                target = target.narrow(dim, start, size)
            target.copy_(box.values)
            self._filled.setdefault(key, []).append((box.offsets, tuple(box.values.shape)))

    def finish(self, source: Path) -> dict[str, Tensor]:
        """All tensors, whole.

        Raises:
            ValueError: files do not hold each element of one, once.
        """
        for key, tensor in self._tensors.items():
            boxes = self._filled.get(key, [])
            if not tiles_exactly(tuple(tensor.shape), boxes):
                held = sum(math.prod(sizes) for _, sizes in boxes)
                raise ValueError(
                    f"the files of '{source}' must hold all of every tensor, once; of {key!r} they "
                    f"hold {held} of {tensor.numel()} elements. Is a file missing, or there twice?"
                )
        return self._tensors
