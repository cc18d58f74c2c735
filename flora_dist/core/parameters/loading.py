# SPDX-License-Identifier: Apache-2.0
"""Loads state as it was saved: same dtypes, nothing shared, checked before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.parameters.names import names_of
from flora_dist.core.parameters.trainable import Trainable, check_level
from flora_dist.core.state.settings import check_settings, completed, config_of

Groups = Sequence[Mapping[str, Any]]


@contextmanager
def beside_torch(
    optimizer: torch.optim.Optimizer, fresh_slots: Callable[[Groups], Sequence[Trainable]]
) -> Iterator[None]:
    """Take the states past torch's own ``load_state_dict``, which would cast them.

    ``fresh_slots``: of these groups, not configured.

    Raises:
        ValueError: what is loaded inside does not fit; nothing has changed then.
    """
    states: list[tuple[Tensor, dict[str, Any], Mapping[str, Any]]] = []

    def take(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        # After the user's own hooks.
        final = {**final, "param_groups": [_completed(g) for g in final["param_groups"]]}
        check_groups(final["param_groups"], optimizer.param_groups)
        states.extend(saved_states(final, optimizer.param_groups))
        check_states(states, fresh_slots(optimizer.param_groups))
        return {**final, "state": {}}

    def give(_: torch.optim.Optimizer) -> None:
        for tensor, state, _group in states:
            optimizer.state[tensor] = copy_in(state, tensor)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(give, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _completed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with the settings that are younger than it."""
    settings = completed(group)
    if settings is None:
        raise ValueError(
            "a group's state must hold Flora's settings, at least 'rank', 'sketch', 'seed' and "
            f"'lr'; this one has {sorted(set(group) - {'params', 'param_names'})}. It was saved by "
            "another optimizer: load what a Flora saved."
        )
    try:
        check_settings(settings)
    except ValueError as error:
        raise ValueError(f"a state's settings must be those of a run; {error}") from error
    return settings


def check_groups(saved: Groups, current: Groups) -> None:
    """Refuse groups of another model, order or seed."""
    sizes, wanted = [[len(g["params"]) for g in groups] for groups in (saved, current)]
    if sizes != wanted:
        raise ValueError(
            f"the state must have parameter groups of {wanted} parameters; it has {sizes}. Build "
            "the optimizer over the parameters and groups of the run that saved it."
        )
    for index, (theirs, ours) in enumerate(zip(saved, current, strict=True)):
        if theirs["seed"] != ours["seed"]:
            raise ValueError(
                f"the state must have the optimizer's seed; group {index} was saved with seed="
                f"{theirs['seed']}, this optimizer has seed={ours['seed']}. Pass "
                f"seed={theirs['seed']}."
            )
        if "param_names" in ours and "param_names" not in theirs:
            raise ValueError(
                f"the state of group {index} must have parameter names, since this optimizer has "
                "them; it knows its parameters by position alone. Construct the optimizer from "
                "model.parameters()."
            )
        if "param_names" in theirs and "param_names" in ours:
            _check_names(list(names_of([theirs])), list(names_of([ours])))


def _check_names(saved: list[str], current: list[str]) -> None:
    for theirs, ours in zip(saved, current, strict=True):
        if theirs != ours:
            raise ValueError(
                f"parameters must stand in the order they were saved in; the state has {theirs!r} "
                f"where the optimizer has {ours!r}. Build it over the same model."
            )


def saved_states(
    state_dict: Mapping[str, Any], current: Groups
) -> Iterator[tuple[Tensor, dict[str, Any], Mapping[str, Any]]]:
    """Each parameter with its saved state (a copy of the dict) and its saved group."""
    state = state_dict["state"]
    for theirs, ours in zip(state_dict["param_groups"], current, strict=True):
        for saved_id, tensor in zip(theirs["params"], ours["params"], strict=True):
            if saved_id in state:
                yield tensor, dict(state[saved_id]), theirs


def check_states(
    states: Sequence[tuple[Tensor, dict[str, Any], Mapping[str, Any]]], slots: Sequence[Trainable]
) -> None:
    """Refuse state that does not fit the model, before anything is replaced.

    ``slots`` are fresh ones: checking configures them by the saved settings.
    """
    by_tensor = {id(tensor): (state, group) for tensor, state, group in states}
    for tensor, state, _ in states:
        _check_nested_names(state, [slot for slot in slots if slot.tensor is tensor])
    for slot in slots:
        if id(slot.tensor) in by_tensor:
            state, group = by_tensor[id(slot.tensor)]
            slot.configure(config_of(group), state)
            if slot.has_state(state):
                check_level(slot, slot.own_state(state))


def _check_nested_names(state: dict[str, Any], slots: Sequence[Trainable]) -> None:
    """Refuse states, kept by name in a flat tensor's, of parameters that it does not hold."""
    if all(slot.own_state(state) is state for slot in slots):
        return
    names = {slot.part.name for slot in slots}
    if unknown := sorted(set(state) - names):
        raise ValueError(
            "a flat tensor's state must be of the parameters it holds; the state has "
            f"{unknown[0]!r}, the tensor {', '.join(sorted(names))}. Build the engine over the "
            "same model."
        )


def copy_in(value: Any, tensor: Tensor) -> Any:
    """A saved value with its own memory on the parameter's device, dtype untouched.

    torch's own loading casts state to the parameter's dtype: fp32 statistics of bf16 weights
    would be cut to 8 bits (torch/optim/optimizer.py, ``_process_value_according_to_param_policy``).
    """
    if isinstance(value, Tensor):
        return value.detach().to(device=tensor.device, copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: copy_in(entry, tensor) for key, entry in value.items()}
    return value
