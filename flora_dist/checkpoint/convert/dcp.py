# SPDX-License-Identifier: Apache-2.0
"""Reads a vanilla folder of torch's DCP: tensors as they are, the rest with weights_only=True."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from flora_dist.checkpoint.agreement import readable
from flora_dist.checkpoint.boxes import Boxes, BoxPlanner, BoxReader
from flora_dist.checkpoint.canonical import Box, elements_shape
from flora_dist.checkpoint.contents import settings_of, weight_key
from flora_dist.checkpoint.convert.whole import (
    Shape,
    Whole,
    canonical_states,
    check_settings,
    counters_of,
)
from flora_dist.checkpoint.files import open_plain
from flora_dist.checkpoint.folder import Json
from flora_dist.checkpoint.json_values import split
from flora_dist.checkpoint.manifest import size_of
from flora_dist.checkpoint.metadata import read_metadata
from flora_dist.checkpoint.safe_load import check_memory, load_safely
from flora_dist.checkpoint.stored import check_boxes
from flora_dist.core.parameters.names import position_name
from flora_dist.core.sketch.keys import canonical_name


def read_dcp(path: Path) -> Whole:
    """What ``dcp.save({"model": ..., "optimizer": ...})`` from ``get_state_dict`` has written.

    Raises:
        ValueError: other keys, another optimizer, or files that cannot be read.
    """
    tree = _tree(path)
    model, optimizer = tree.pop("model", None), tree.pop("optimizer", None)
    if not isinstance(model, dict) or not isinstance(optimizer, dict):
        raise ValueError(  # noqa: TRY004 - a file's fault
            f"a DCP checkpoint must have the keys 'model' and 'optimizer'; '{path}' has "
            f"{sorted(tree) or 'one of them alone'}. Save "
            '{"model": ..., "optimizer": ...} from get_state_dict(model, optimizer).'
        )
    states, groups = _unflattened(optimizer)
    names = _names(states, groups, path)
    shapes = {names.get(key, canonical_name(key)): tuple(v.shape) for key, v in model.items()}
    tensors = {
        weight_key(names.get(key, canonical_name(key))): value.reshape(elements_shape(value.shape))
        for key, value in model.items()
    }
    trained = {names[key] for group in groups for key in group["params"]}
    aliases = _tied(tensors, shapes, trained)
    for alias in aliases:
        del tensors[weight_key(alias)], shapes[alias]
    counters: dict[str, dict[str, Json]] = {}
    for group in groups:
        for key in group["params"]:
            state = states.get(key, {})
            tensors |= canonical_states(names[key], shapes[names[key]], group, state, path)
            counters[names[key]] = counters_of(state)
    extra, left_out = split(tree)
    return Whole(
        step=max((int(str(c.get("step", 0))) for c in counters.values()), default=0),
        tensors=tensors,
        shapes=shapes,
        counters=counters,
        groups=[([names[k] for k in group["params"]], settings_of(group)) for group in groups],
        extra=extra,
        aliases=aliases,
        left_out=left_out,
    )


def _names(states: Mapping[str, Any], groups: list[dict[str, Any]], path: Path) -> dict[str, str]:
    """The optimizer's own name of each parameter: its first, or its position if it has none."""
    names = {}
    for group in groups:
        check_settings(group, path)
        given = group.get("param_names") or group["params"]
        for key, name in zip(group["params"], given, strict=True):
            position = states.get(key, {}).get("position")
            names[key] = canonical_name(name) if position is None else position_name(position)
    return names


def _tied(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], trained: set[str]
) -> dict[str, str]:
    """Names that are not the optimizer's, with every bit and the shape of one that is."""
    aliases = {}
    for name, shape in shapes.items():
        if name in trained or math.prod(shape) < 2:
            continue
        own = tensors[weight_key(name)]
        for other in sorted(trained):
            value = tensors[weight_key(other)]
            if shapes[other] == shape and value.dtype == own.dtype and torch.equal(own, value):
                aliases[name] = other
                break
    return aliases


# ---- the tree of keys


def _unflattened(optimizer: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """States by parameter, and groups; also where ``flatten_optimizer_state_dict`` was set."""
    if "param_groups" in optimizer:
        return optimizer.get("state", {}), list(optimizer["param_groups"])
    states: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in optimizer.items():
        kind, _, rest = key.partition(".")
        name, _, entry = rest.rpartition(".")
        {"state": states, "param_groups": settings}[kind].setdefault(name, {})[entry] = value
    groups: list[dict[str, Any]] = []
    for name, own in settings.items():  # equal settings, one group
        known = next((g for g in groups if all(g[k] == v for k, v in own.items())), None)
        if known is None:
            known = {**own, "params": []}
            groups.append(known)
        known["params"].append(name)
    return states, groups


def _tree(path: Path) -> dict[str, Any]:
    metadata = read_metadata(path / ".metadata")
    paths = metadata.planner_data
    if not isinstance(paths, dict):
        raise ValueError(  # noqa: TRY004 - a file's fault
            f"'{path / '.metadata'}' must name nested keys; it has none. Save nested dicts."
        )
    values: dict[str, Any] = _tensors(path, metadata)
    tree: dict[Any, Any] = {}
    for key, steps in paths.items():
        node = tree
        for step in steps[:-1]:
            node = node.setdefault(step, {})
        node[steps[-1]] = values[key] if key in values else _object(path, metadata, key)
    return {str(key): _lists(value) for key, value in tree.items()}


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_lists(node[key]) for key in sorted(node)]
    return {key: _lists(value) for key, value in node.items()}


def _tensors(path: Path, metadata: Metadata) -> dict[str, Tensor]:
    names = {place.relative_path for place in metadata.storage_data.values()}
    sizes = {name: size_of(path / name) or 0 for name in names}
    check_boxes(metadata, sizes, path)
    check_memory(sum(sizes.values()), f"'{path}'")
    found = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    boxes = {
        key: Boxes.of(tuple(t.shape), t.dtype, [Box(offsets=(0,) * t.ndim, values=t)])
        for key, t in found.items()
    }
    with readable(path):
        dcp_load(dict(boxes), storage_reader=BoxReader(path), planner=BoxPlanner(), no_dist=True)
    return found


def _object(path: Path, metadata: Metadata, key: str) -> Any:
    """What DCP would unpickle freely."""
    place = metadata.storage_data[MetadataIndex(key)]
    file = path / place.relative_path  # a plain name: the metadata has no others
    with open_plain(file) as stream:
        stream.seek(place.offset)
        content = stream.read(place.length)
    return load_safely(io.BytesIO(content), f"{key!r} in '{file}'")
