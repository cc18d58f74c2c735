# SPDX-License-Identifier: Apache-2.0
"""Reads the folder that DeepSpeed's own ``engine.save_checkpoint`` wrote, without DeepSpeed.

Where each rank held what is computed from shapes and partition sizes, as the engine did: stages 1
and 2 cut one line of all parameters, in the order that the file names them; stage 3 cuts each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_dist.checkpoint.canonical import element_boxes, elements_shape, entry_shape, owned_boxes
from flora_dist.checkpoint.contents import settings_of, state_key, weight_key
from flora_dist.checkpoint.convert.deepspeed_files import (
    MODEL_FILES,
    check_world,
    count_in,
    extra_of,
    load_file,
    optimizer_files,
)
from flora_dist.checkpoint.convert.engine_facts import scale_of
from flora_dist.checkpoint.convert.stage_0 import read_stage_0
from flora_dist.checkpoint.convert.whole import (
    Assembly,
    Shape,
    Whole,
    check_entry,
    check_settings,
    counters_of,
)
from flora_dist.checkpoint.folder import Json
from flora_dist.core.layouts.flat import FlatLayout, FlatPart, Span, cut_each, cut_line
from flora_dist.core.sketch.keys import canonical_name
from flora_dist.core.state.settings import config_of
from flora_dist.core.state.spec import geometry_of, state_tensors

__all__ = ["MODEL_FILES", "read_deepspeed"]
_WEIGHTS = 3
"""The stage that cuts weights."""
Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _SavedPartition:
    """One flat tensor of a rank."""

    flat: Tensor
    spans: tuple[Span, ...]
    group: Group
    """Of the optimizer, with its settings."""


def read_deepspeed(path: Path) -> Whole:
    """The whole state in one tag's folder.

    Raises:
        ValueError: another optimizer, missing files, or objects that weights_only refuses.
    """
    files = sorted(path.glob(MODEL_FILES))
    single = path / "mp_rank_00_model_states.pt"
    head_file = single if single.exists() else path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    if head_file not in files:
        raise ValueError(f"'{path}' must have '{head_file.name}'; it does not. Copy all files.")
    head = load_file(head_file)
    check_world(head, path)
    if head.get("optimizer") is not None:
        return read_stage_0(head, path)
    return _read_partitions(head, path)


def _read_partitions(head: Mapping[str, Any], path: Path) -> Whole:
    lines = [
        [(canonical_name(name), tuple(shape)) for name, shape in group.items()]
        for group in head["param_shapes"]
    ]
    shapes: dict[str, Shape] = {name: shape for line in lines for name, shape in line}
    assembly, counters = Assembly(), dict[str, dict[str, Json]]()
    groups: list[tuple[list[str], dict[str, Json]]] = []
    loss_scale = None
    files = optimizer_files(path, count_in(head, "dp_world_size", path))
    sizes: list[int] = []
    for rank, file in enumerate(files):
        saved = load_file(file)["optimizer_state_dict"]
        flats, base = _flats(saved), _base(saved, path)
        sizes = sizes or _sizes(saved, flats)
        states = {n: own for st in base["state"].values() for n, own in st.items()}
        partitions = list(_partitions(saved, flats, base, lines, sizes, rank, len(files)))
        for partition in partitions:
            for part in _parts(partition.flat, partition.spans, rank, file):
                own = states.get(part.name, {})
                _take_weight(assembly, part)
                _take_states(assembly, part, partition.group, own, file)
                found = counters_of(own)
                if counters.setdefault(part.name, found) != found:
                    raise ValueError(
                        f"ranks must agree on a state's counters; {part.name!r} has {found} in "
                        f"'{file}', {counters[part.name]} before. Copy all files, of one save."
                    )
        if rank == 0:
            groups = _groups(base, partitions)
            loss_scale = scale_of(vars(saved["loss_scaler"])) if "loss_scaler" in saved else None
    others, aliases = _others(head, set(shapes))
    for part in _frozen_parts(head, path, len(files)):
        others.pop(part.name, None)
        shapes[part.name] = part.shape
        _take_weight(assembly, part)
    shapes |= {name: tuple(value.shape) for name, value in others.items()}
    tensors = assembly.finish(path)
    tensors |= {weight_key(n): v.reshape(elements_shape(v.shape)) for n, v in others.items()}
    extra, left_out = extra_of(head, loss_scale)
    order = [canonical_name(key) for key in head["module"]]
    return Whole(
        step=count_in(head, "global_steps", path),
        tensors=tensors,
        shapes={name: shapes[name] for name in order if name in shapes},
        counters=counters,
        groups=groups,
        extra=extra,
        aliases=aliases,
        left_out=left_out,
    )


# ---- the optimizer's files


def _is_third(saved: Mapping[str, Any]) -> bool:
    return saved.get("zero_stage") == _WEIGHTS


def _flats(saved: Mapping[str, Any]) -> list[Tensor]:
    """This rank's partitions of the fp32 weights."""
    key = "fp32_flat_groups" if _is_third(saved) else "single_partition_of_fp32_groups"
    return list(saved[key])


def _base(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    base = saved["optimizer_state_dict" if _is_third(saved) else "base_optimizer_state"]
    if not isinstance(base, dict):
        raise ValueError(f"'{path}' is an elastic checkpoint, which holds no state of Flora.")  # noqa: TRY004
    for group in base["param_groups"]:
        check_settings(group, path)
    return base


def _sizes(saved: Mapping[str, Any], flats: list[Tensor]) -> list[int]:
    """Elements of a partition, by the first rank's, which is padded only if it is the last too."""
    is_cut = "zero_stage" in saved and not _is_third(saved)
    paddings = saved["group_paddings"] if is_cut else [0] * len(flats)
    return [flat.numel() + padding for flat, padding in zip(flats, paddings, strict=True)]


def _partitions(
    saved: Mapping[str, Any],
    flats: list[Tensor],
    base: Mapping[str, Any],
    lines: list[list[tuple[str, Shape]]],
    sizes: list[int],
    rank: int,
    world_size: int,
) -> Iterator[_SavedPartition]:
    groups = [g for g in base["param_groups"] for _ in g["params"]]  # stage 3: sub-groups
    aligned = saved.get("param_alignment_paddings")
    _check_room(lines, sizes, world_size)
    for index, (flat, line, group) in enumerate(zip(flats, lines, groups, strict=True)):
        numels = [math.prod(shape) for _, shape in line]
        if _is_third(saved):
            chunks = [-(-numel // world_size) for numel in numels]
            spans = cut_each(line, sizes=chunks, world_size=world_size)
        else:
            lengths = numels
            if aligned is not None:
                lengths = [n + pad for n, pad in zip(numels, aligned[index], strict=True)]
            offsets = [sum(lengths[:place]) for place in range(len(line))]
            where = {"rank": rank, "world_size": world_size}
            spans = cut_line(line, offsets=offsets, size=sizes[index], **where)
        yield _SavedPartition(flat=flat.reshape(-1), spans=spans, group=group)


def _check_room(lines: list[list[tuple[str, Shape]]], sizes: list[int], world_size: int) -> None:
    """Refuse shapes that no partitions can hold, before memory is made for them."""
    for line, size in zip(lines, sizes, strict=True):
        needed = sum(math.prod(shape) for _, shape in line)
        if needed > size * world_size:
            raise ValueError(
                f"partitions must hold all parameters; {world_size} partitions of {size} elements "
                f"cannot hold {needed}, from {line[0][0]!r} on. Copy all files again, of one save."
            )


def _groups(
    base: Mapping[str, Any], partitions: list[_SavedPartition]
) -> list[tuple[list[str], dict[str, Json]]]:
    found = []
    for group in base["param_groups"]:
        own = [p for p in partitions if p.group is group]
        names = [span.name for partition in own for span in partition.spans]
        found.append((names, settings_of(group)))
    return found


# ---- parts


def _parts(flat: Tensor, spans: tuple[Span, ...], rank: int, file: Path) -> Iterator[FlatPart]:
    layout = FlatLayout()
    layout.add(flat, spans, rank=rank, reducer=None)
    for part in layout.parts(flat, ""):
        assert isinstance(part, FlatPart)
        if part.weight().numel() != part.num_elements:
            raise ValueError(
                f"'{file}' must hold {part.num_elements} elements of {part.name!r}; it holds "
                f"{part.weight().numel()}. Copy it again."
            )
        yield part


def _take_weight(assembly: Assembly, part: FlatPart) -> None:
    boxes = element_boxes(part.shape, part.tiles, part.weight())
    shape, dtype = elements_shape(part.shape), part.weight().dtype
    assembly.add(weight_key(part.name), shape, dtype, boxes)


def _take_states(
    assembly: Assembly, part: FlatPart, group: Group, own: Mapping[str, Any], file: Path
) -> None:
    if "step" not in own:
        return
    config = config_of(group)
    geometry = geometry_of(part.name, part.shape, config)
    for entry in state_tensors(geometry, config):
        local = own.get(entry.name)
        what = f"{entry.name} of {part.name!r}"
        held = check_entry(local, part.local_state_shape(entry), what, file)
        key, shape = state_key(part.name, entry.name), entry_shape(entry, geometry)
        assembly.add(key, shape, held.dtype, owned_boxes(part, geometry, entry, held))


# ---- what the optimizer does not hold


def _others(head: Mapping[str, Any], trained: set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Buffers and frozen parameters, as far as the head holds them; and names of tied ones."""
    shared = head.get("shared_params") or {}
    aliases = {canonical_name(a): canonical_name(name) for a, name in shared.items()}
    named = ((canonical_name(key), value) for key, value in head["module"].items())
    others = {n: v for n, v in named if n not in trained and n not in aliases}
    return others, aliases


def _frozen_parts(head: Mapping[str, Any], path: Path, world_size: int) -> Iterator[FlatPart]:
    """Stage 3: each rank's file of model states has its partitions of frozen parameters."""
    if (path / "mp_rank_00_model_states.pt").exists():
        return
    shapes = head.get("frozen_param_shapes") or {}
    for rank in range(world_size if shapes else 0):
        file = path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        fragments = load_file(file)["frozen_param_fragments"]
        for name, shape in shapes.items():
            flat = fragments[name].reshape(-1)
            line = [(canonical_name(name), tuple(shape))]
            spans = cut_each(line, sizes=[flat.numel()], world_size=world_size)
            yield from _parts(flat, spans, rank, file)
