# SPDX-License-Identifier: Apache-2.0
"""A manifest against the running Flora: what must be equal, and fresh tensors for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora_dist.checkpoint.boxes import Boxes
from flora_dist.checkpoint.canonical import element_boxes, elements_shape, entry_shape, state_boxes
from flora_dist.checkpoint.contents import (
    SETTINGS,
    ModelTensor,
    check_between_steps,
    dtype_name,
    saved_counters,
    saved_groups,
    settings_of,
    state_key,
    weight_key,
)
from flora_dist.checkpoint.folder import Json, Manifest
from flora_dist.checkpoint.json_values import filled_like
from flora_dist.core.parameters.trainable import Trainable, check_level, check_state
from flora_dist.core.state.settings import config_of
from flora_dist.core.state.spec import LEVELS
from flora_dist.flora import Flora

Settings = dict[str, Any]
_COUNTERS = ("format", "gradients", "seed", "sketch", "step", "window", "position")
"""Numbers of a parameter's state that do not depend on its layout."""
_MOST_STEPS = 1 << 53
"""Above it a float no longer holds a step exactly, and a key's 64-bit word not its window."""
State = dict[Tensor, dict[str, Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedFlora:
    """Fresh weights, states and settings for one optimizer, to be filled and put in place."""

    optimizer: Flora
    tensors: dict[str, Boxes]
    """By key; they share memory with the two below."""
    weights: list[tuple[Tensor, Tensor]]
    """What the model holds, and on the CPU what comes there."""
    states: State
    settings: list[Settings]
    """Of each group."""

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Replace weights, states and settings."""
        for here, coming in self.weights:
            here.copy_(coming)
        for group, settings in zip(self.optimizer.param_groups, self.settings, strict=True):
            for name, value in settings.items():
                if isinstance(group[name], Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = value
        self.optimizer.state.clear()
        self.optimizer.state.update(self.states)
        self.optimizer.gradients.forget()


def fit(manifest: Manifest, optimizer: Flora, others: Iterable[ModelTensor]) -> FittedFlora:
    """Check a manifest against the model and make room for what it lists; nothing changes.

    Raises:
        ValueError: another model, seed, level or dtype, or state of a parameter that is frozen.
    """
    check_between_steps(optimizer)
    others = list(others)
    groups = optimizer.roster.filled(optimizer.param_groups)
    slots = optimizer.roster.fresh(groups, optimizer.state)
    names = [slot.part.name for slot in slots]
    _check_tensors(manifest, [*names, *(held.name for held in others)])
    settings = [_settings_of(manifest, group, slots) for group in groups]
    by_group = {id(group): new for group, new in zip(groups, settings, strict=True)}
    fitted = FittedFlora(optimizer=optimizer, tensors={}, weights=[], states={}, settings=settings)
    for slot in slots:
        part = slot.part
        _add_weights(
            fitted,
            manifest,
            ModelTensor(name=part.name, shape=part.shape, tiles=part.tiles, local=part.weight()),
        )
        slot.configure(config_of({**slot.group, **by_group[id(slot.group)]}), {})
        _add_state(fitted, manifest, slot)
    for held in others:
        _add_weights(fitted, manifest, held)
    return fitted


def _check_tensors(manifest: Manifest, names: Sequence[str]) -> None:
    saved = {key.removeprefix("model.") for key in manifest.tensors if key.startswith("model.")}
    for text, missing in (
        ("the checkpoint lacks", set(names) - saved),
        ("the model lacks", saved - set(names)),
    ):
        if missing:
            raise ValueError(
                "checkpoint and model must have the same parameters and buffers; "
                f"{text} {min(missing)!r}{_more(missing)}. Load it into the model that saved it."
            )


def _more(names: set[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _settings_of(
    manifest: Manifest, group: Mapping[str, Any], slots: Sequence[Trainable]
) -> Settings:
    """The saved settings of a group's parameters, which must have stood in groups alike."""
    names = [slot.part.name for slot in slots if slot.group is group]
    saved: dict[str, Settings] = {}
    for theirs, own in saved_groups(manifest):
        saved |= dict.fromkeys(theirs, own)
    found = {name: saved[name] for name in names if name in saved}
    if not found:  # frozen parameters, say, that the other optimizer was not given
        return {}
    first, settings = next(iter(found.items()))
    for name, others in found.items():
        if different := [key for key in SETTINGS if others.get(key) != settings.get(key)]:
            raise ValueError(
                f"parameters of one group must have been saved with equal settings; "
                f"{different[0]} of {first!r} is {settings.get(different[0])!r}, of {name!r} "
                f"{others.get(different[0])!r}. Group parameters as the run that saved them."
            )
    settings = settings_of(settings)
    if settings["seed"] != group["seed"]:
        raise ValueError(
            f"the checkpoint must have the optimizer's seed; it was saved with seed="
            f"{settings['seed']}, this optimizer has seed={group['seed']}. Pass "
            f"seed={settings['seed']}."
        )
    return {name: filled_like(group[name], value, name) for name, value in settings.items()}


def _add_weights(fitted: FittedFlora, manifest: Manifest, held: ModelTensor) -> None:
    key = weight_key(held.name)
    shape = elements_shape(held.shape)
    _check_facts(manifest, key, shape, held.local.dtype)
    coming = torch.empty(held.local.shape, dtype=held.local.dtype)
    fitted.weights.append((held.local, coming))
    boxes = element_boxes(held.shape, held.tiles, coming)
    fitted.tensors[key] = Boxes.of(shape, coming.dtype, boxes)


def _add_state(fitted: FittedFlora, manifest: Manifest, slot: Trainable) -> None:
    part = slot.part
    counters = dict(saved_counters(manifest).get(part.name, {}))
    # Absent where the other optimizer was not given the parameter: it was frozen there.
    _check_shape(counters.pop("shape", list(part.shape)), slot)
    if "step" not in counters:
        return
    _check_counters(counters, slot)
    if not slot.tensor.requires_grad:
        raise ValueError(
            f"a parameter with saved state must be trained; {part.name!r} is frozen here and was "
            "trained in the run that saved it. Set requires_grad as that run did."
        )
    state = fitted.states.setdefault(slot.tensor, {})
    slot.create_state(state)
    own = slot.own_state(state)
    own.update(counters)
    check_state(slot, own, slot.config)
    check_level(slot, own)
    # How sketches of gradients come about may change from run to run; that is not what was saved.
    own["gradients"] = LEVELS.index(slot.level)
    for entry in slot.entries:
        local = part.local(own[entry.name])
        key, shape = state_key(part.name, entry.name), entry_shape(entry, slot.geometry)
        _check_facts(manifest, key, shape, local.dtype)
        boxes = state_boxes(slot.stepped, slot.geometry, entry, local)
        fitted.tensors[key] = Boxes.of(shape, local.dtype, boxes)


def _check_counters(counters: Mapping[str, Json], slot: Trainable) -> None:
    """Refuse numbers that no run has counted; which of them must be this run's comes later."""
    for name, value in counters.items():
        lowest, end = (-(2**63), 2**63) if name == "seed" else (0, _MOST_STEPS)
        is_whole = isinstance(value, int) and not isinstance(value, bool) and lowest <= value < end
        if name not in _COUNTERS or not is_whole:
            raise ValueError(
                f"the counters that a checkpoint has of {slot.part.name!r} must be whole numbers "
                f"named {', '.join(_COUNTERS)}; {name!r} is {value!r}. Load another checkpoint."
            )
    if counters.get("position") != slot.position:
        raise ValueError(
            "a parameter without a name must have the position that it was saved at, "
            f"{counters.get('position')!r}; {slot.part.name!r} has {slot.position!r}. Build the "
            "optimizer as the run that saved it."
        )


def _check_shape(saved: Json, slot: Trainable) -> None:
    if saved != list(slot.part.shape):
        raise ValueError(
            f"{slot.part.name!r} must have the shape it was saved with, {saved}; it has "
            f"{list(slot.part.shape)}. Load the checkpoint into the model that saved it."
        )


def _check_facts(manifest: Manifest, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    facts = manifest.tensors.get(key)
    if facts is None:
        raise ValueError(
            f"the checkpoint must hold {key!r}; it does not. Use the settings and model that it "
            "was made with."
        )
    if facts.shape != shape:
        raise ValueError(
            f"{key!r} must have the shape {shape}; the checkpoint has {facts.shape}. Load it into "
            "the model that saved it, with its rank and block."
        )
    theirs = getattr(torch, facts.dtype, None)
    is_rounded = key.startswith("model.") and dtype.is_floating_point
    if theirs == dtype or (
        is_rounded and isinstance(theirs, torch.dtype) and theirs.is_floating_point
    ):
        return
    raise ValueError(
        f"{key!r} must be {dtype_name(dtype)}; the checkpoint has {facts.dtype}. Build the model "
        "in the precision of the run that saved it."
    )
