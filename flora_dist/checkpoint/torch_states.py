# SPDX-License-Identifier: Apache-2.0
"""Other optimizers of torch, as DCP's state dicts know them: plain models, DDP, DTensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from flora_dist.checkpoint.boxes import Boxes
from flora_dist.checkpoint.canonical import Box
from flora_dist.checkpoint.contents import (
    Contents,
    dtype_name,
    saved_counters,
    saved_groups,
    state_key,
    weight_key,
)
from flora_dist.checkpoint.folder import Json, Manifest, TensorFacts
from flora_dist.checkpoint.json_values import check_like, filled_like
from flora_dist.core.layouts.dtensor import local_of, offsets_of, shaped_like
from flora_dist.core.state.settings import check_rate


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedStates:
    """Fresh tensors in the shape of a model's and an optimizer's state dicts."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tensors: dict[str, Boxes]
    weights: dict[str, Any]
    states: dict[str, Any]

    def put_in_place(self) -> None:
        """Load both."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=self.weights,
            optim_state_dict=self.states,
        )


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contents:
    """The state as it stands; an optimizer that has not stepped yet creates its own."""
    weights, states = _state_dicts(model, optimizer)
    tensors = {key: _boxes(tensor) for key, tensor in _tensors(weights, states)}
    return Contents(
        tensors=tensors,
        parameters={name: _numbers(state) for name, state in states["state"].items()},
        groups=[_group(group) for group in states["param_groups"]],
    )


def fit(manifest: Manifest, model: nn.Module, optimizer: torch.optim.Optimizer) -> FittedStates:
    """Check a manifest against model and optimizer, and make room for what it lists.

    Raises:
        ValueError: another model or optimizer.
    """
    weights, states = _state_dicts(model, optimizer)
    fresh_weights = {name: _fresh(value) for name, value in weights.items()}
    fresh_states: dict[str, Any] = {
        "state": {n: {k: _fresh(v) for k, v in s.items()} for n, s in states["state"].items()},
        "param_groups": [dict(group) for group in states["param_groups"]],
    }
    tensors = {key: _boxes(tensor) for key, tensor in _tensors(fresh_weights, fresh_states)}
    facts = {k: TensorFacts(shape=b.shape, dtype=dtype_name(b.dtype)) for k, b in tensors.items()}
    for key in sorted({*facts, *manifest.tensors}):
        if facts.get(key) != manifest.tensors.get(key):
            raise ValueError(
                f"checkpoint and model must have the same tensors; {key!r} is "
                f"{manifest.tensors.get(key)} there and {facts.get(key)} here. Load it into the "
                "model and optimizer that saved it."
            )
    _take_numbers(manifest, fresh_states)
    return FittedStates(
        model=model,
        optimizer=optimizer,
        tensors=tensors,
        weights=fresh_weights,
        states=fresh_states,
    )


def _state_dicts(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Any: DCP's own types name every value that any optimizer may have."""
    return get_state_dict(model, optimizer)


def _take_numbers(manifest: Manifest, states: dict[str, Any]) -> None:
    counters = saved_counters(manifest)
    for name, state in states["state"].items():
        for key, value in counters.get(name, {}).items():
            if isinstance(state.get(key), Tensor) or not isinstance(value, int | float):
                raise ValueError(  # noqa: TRY004 - a file's fault
                    f"the counters of a checkpoint must be numbers; {key!r} of {name!r} is "
                    f"{value!r}. Load another checkpoint."
                )
            check_like(value, state.get(key), f"{key!r} of {name!r}")
            state[key] = value
    saved = {tuple(names): settings for names, settings in saved_groups(manifest)}
    for group in states["param_groups"]:
        names = tuple(group["params"])
        if names not in saved:
            raise ValueError(
                f"the optimizer must have the groups it was saved with; none has the "
                f"{len(names)} parameters from {names[0]!r}. Group them as the run that saved."
            )
        _check_rates(saved[names])
        group |= {key: _like(group.get(key), value, key) for key, value in saved[names].items()}


def _check_rates(settings: Mapping[str, Any]) -> None:
    """Refuse what neither steps nor loads."""
    for name in settings.keys() & {"lr", "weight_decay"}:
        check_rate(name, settings[name])


def _like(kept: Any, value: Any, name: str) -> Any:
    """A saved setting in the type that the group has it in."""
    if isinstance(kept, Tensor):
        return filled_like(kept, value, name)
    check_like(value, kept, name)
    return tuple(value) if isinstance(kept, tuple) else value


def _tensors(weights: Any, states: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        yield weight_key(name), tensor
    for name, state in states["state"].items():
        for entry, value in state.items():
            if isinstance(value, Tensor):
                yield state_key(name, entry), value


def _boxes(tensor: Tensor) -> Boxes:
    box = Box(offsets=offsets_of(tensor), values=local_of(tensor.detach()))
    return Boxes.of(tuple(tensor.shape), tensor.dtype, [box])


def _fresh(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    local = torch.empty_like(local_of(value))
    return shaped_like(value, local) if isinstance(value, DTensor) else local


def _numbers(state: dict[str, Any]) -> dict[str, Json]:
    return {k: v for k, v in state.items() if isinstance(v, int | float)}


def _group(group: dict[str, Any]) -> Json:
    settings = {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }
    _check_rates(settings)
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return {"names": list(group["params"]), "settings": listed}
