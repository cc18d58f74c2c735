# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own checkpoint of stage 0: whole weights, and Flora's states by position alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_dist.checkpoint.canonical import elements_shape
from flora_dist.checkpoint.contents import settings_of, weight_key
from flora_dist.checkpoint.convert.deepspeed_files import count_in, extra_of
from flora_dist.checkpoint.convert.engine_facts import scale_of
from flora_dist.checkpoint.convert.whole import Whole, canonical_states, check_settings, counters_of
from flora_dist.core.sketch.keys import canonical_name


def read_stage_0(head: Mapping[str, Any], path: Path) -> Whole:
    """What the one file of model states holds.

    Raises:
        ValueError: the file does not say which parameter a state is of.
    """
    saved = head["optimizer"]
    base = saved.get("optimizer_state_dict", saved)
    groups = base["param_groups"]
    for group in groups:
        check_settings(group, path)
    weights, aliases = _weights(head)
    names = _names(groups, weights, set(map(canonical_name, head["buffer_names"])), path)
    copies = [copy for group in saved.get("fp32_groups", ()) for copy in group]
    weights |= dict(zip((n for own in names for n in own), copies, strict=False))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    tensors = {weight_key(n): w.reshape(elements_shape(shapes[n])) for n, w in weights.items()}
    counters = {}
    for group, own in zip(groups, names, strict=True):
        for key, name in zip(group["params"], own, strict=True):
            state = base["state"].get(key, {})
            tensors |= canonical_states(name, shapes[name], group, state, path)
            counters[name] = counters_of(state)
    extra, left_out = extra_of(head, scale_of(saved))
    return Whole(
        step=count_in(head, "global_steps", path),
        tensors=tensors,
        shapes=shapes,
        counters=counters,
        groups=[(own, settings_of(group)) for group, own in zip(groups, names, strict=True)],
        extra=extra,
        aliases=aliases,
        left_out=left_out,
    )


def _weights(head: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, by its first name; and the other names of tied ones."""
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for key, tensor in head["module"].items():
        name, place = canonical_name(key), (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        weights[name] = tensor
    return weights, aliases


def _names(
    groups: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Tensor],
    buffers: set[str],
    path: Path,
) -> list[list[str]]:
    """Of each group's parameters: as given, or those of the model where that is one group's."""
    if all("param_names" in group for group in groups):
        return [[canonical_name(name) for name in group["param_names"]] for group in groups]
    parameters = [name for name in weights if name not in buffers]
    if len(groups) == 1 and len(groups[0]["params"]) == len(parameters):
        return [parameters]
    raise ValueError(
        "a checkpoint of DeepSpeed's stage 0 must say which parameters its states belong to; "
        f"'{path}' has {sum(len(g['params']) for g in groups)} states without names, and "
        f"{len(parameters)} parameters. Save it with flora_dist.deepspeed.save_checkpoint, or "
        "give the optimizer named parameters."
    )
