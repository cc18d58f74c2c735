# SPDX-License-Identifier: Apache-2.0
"""What is looked at before anything changes: groups when they are added, gradients at a step."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.comm.groups import process_count
from flora_dist.core.parameters import names as naming
from flora_dist.core.parameters.registry import Registry
from flora_dist.core.parameters.trainable import Group, Trainable, check_compressed, check_level
from flora_dist.core.sketch.matrices import smallest_stable_kappa
from flora_dist.core.state.betas import from_betas
from flora_dist.core.state.settings import (
    BETA1,
    KNOBS,
    check_group_keys,
    check_settings,
    config_of,
)
from flora_dist.core.state.spec import geometry_of, has_momentum

# Keys that torch itself and its schedulers write into groups.
_TORCH_KEYS = (
    "params",
    "param_names",
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
    "max_momentum",
    "base_momentum",
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_not_in_turns(roster: Registry) -> None:
    """Refuse to look at gradients outside an engine's step."""
    if roster.is_stepped_in_turns:
        raise RuntimeError(
            "under DeepSpeed gradients exist only inside its step. Call "
            'engine.get_global_grad_norm(), or set "gradient_clipping" in the config.'
        )


def check_levels(slots: Sequence[Trainable], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Refuse to step state of dense gradients with sketched ones, and the reverse."""
    for slot in slots:
        if slot.has_state(state.get(slot.tensor, {})):
            check_level(slot, slot.own_state(state[slot.tensor]))


def create_states(slots: Sequence[Trainable], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """State of those that have none yet, in the order of groups; others' must be of their level."""
    check_levels(slots, state)
    for slot in slots:
        if not slot.has_state(state[slot.tensor]):
            slot.create_state(state[slot.tensor])


def check_named(slots: Sequence[Trainable]) -> None:
    """Refuse, or in one process warn of, parameters that are known by their positions alone.

    Positions depend on who walks the model: DDP and ZeRO, and a host that splits its groups by
    weight decay, would each train another run of the same seed.

    Raises:
        ValueError: there are several processes.
    """
    unnamed = sum(slot.position is not None for slot in slots)
    if not unnamed:
        return
    what = (
        f"{unnamed} parameters have no names, so random matrices depend on their positions, and "
        "another host or layout trains another run. Pass model.named_parameters(), or call "
        "optimizer.take_names(model) before the first step; if positions are meant, build it with "
        "flora_dist.by_position"
    )
    if process_count() > 1:
        raise ValueError(f"with several processes every parameter must have a name; {what}.")
    warnings.warn(f"{what}.", UserWarning, stacklevel=_depth_of_caller())


def defaults_from(given: Mapping[str, Any]) -> Group:
    """A constructor's arguments as what a group has unless it says otherwise, checked."""
    check_as_torch_has_it(given)
    if given["betas"] is not None:
        beta1 = None if given["beta1"] == BETA1 else given["beta1"]
        given = from_betas({**given, "beta1": beta1})
    defaults = {name: given[name] for name in (*KNOBS, "lr", "weight_decay", "maximize")}
    config_of(defaults)
    return {**defaults, "betas": ()}  # where schedulers that cycle a momentum leave it


def check_as_torch_has_it(settings: Mapping[str, Any]) -> None:
    """Refuse what torch's own optimizers can do and this one cannot; how they loop does not matter.

    Raises:
        ValueError: it is asked for.
    """
    for name in ("capturable", "differentiable"):
        if settings.get(name):
            raise ValueError(
                f"Flora cannot be {name}: a step draws matrices from numbers that Python counts, "
                f"and works in place. Leave {name} out, or pass {name}=False."
            )


def check_keys(group: Group, defaults: Group) -> None:
    """Refuse a key of a group that is nearly that of a setting."""
    check_group_keys(group.keys(), (*defaults, *_TORCH_KEYS))


def check_group(group: Group) -> None:
    """Refuse settings and shapes that cannot be right, and warn of a transfer that amplifies."""
    config = check_settings(group)
    names = naming.names_of([group])
    unstable = 0
    for name, tensor in zip(names, naming.tensors_of(group), strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"parameters must be real floating-point tensors of 16, 32 or 64 bits; {name!r} "
                f"is {kind}. Leave it out of the optimizer."
            )
        size = geometry_of(name, tuple(tensor.shape), config)
        if tensor.requires_grad:
            check_compressed(name, size, config)
        if size.rank is not None and config.transfer == "paper" and has_momentum(size, config):
            smallest = smallest_stable_kappa(
                config.sketch, rank=size.rank, block=size.block, beta1=config.beta1
            )
            unstable = max(unstable, smallest if config.kappa < smallest else 0)
    if unstable:
        warnings.warn(
            f"transfer='paper' amplifies noise faster than beta1={config.beta1} forgets it below "
            f"kappa={unstable}; got kappa={config.kappa}. Use transfer='shrink' or a larger kappa.",
            UserWarning,
            stacklevel=_depth_of_caller(),
        )


def _depth_of_caller() -> int:
    """The ``stacklevel`` of the user's line, seen from the caller of this function."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in {"flora_dist", "torch"}:
        frame, depth = frame.f_back, depth + 1
    return depth
