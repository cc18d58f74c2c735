# SPDX-License-Identifier: Apache-2.0
"""torchtitan: an optimizers' container that knows Flora, and its flat states.

torchtitan 0.3 finds optimizers in a dict inside a method, and keeps states by names alone: what it
loads has no "param_names" in its groups, though the state is that of named parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from flora_dist.flora import Flora

NAME = "Flora"


class FloraContainer(OptimizersContainer):  # type: ignore[misc]  # torchtitan has no types
    """torchtitan's container, in which ``optimizer_name="Flora"`` may stand beside AdamW."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]  # torchtitan has no types
        """torchtitan's own; its builder makes the container that the class stands in."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name == NAME:
            return _flora
        factory: Callable[..., torch.optim.Optimizer]
        factory = OptimizersContainer._resolve_optimizer_factory(name)
        return factory


def default_flora(lr: float = 1e-3, **settings: Any) -> Any:
    """A config in which Flora has all parameters, as torchtitan's ``default_adamw`` is AdamW's."""
    everything = ParamGroupConfig(
        pattern=r".*", optimizer_name=NAME, optimizer_kwargs={"lr": lr, **settings}
    )
    return FloraContainer.Config(param_groups=[everything])


def _flora(groups: Sequence[Mapping[str, Any]], **settings: Any) -> Flora:
    """A Flora over torchtitan's groups; ``fused`` and ``foreach`` in them are for torch's."""
    loops = ("fused", "foreach")
    tidy = [{k: v for k, v in group.items() if k not in loops} for group in groups]
    optimizer = Flora(tidy, **settings)
    optimizer.register_load_state_dict_pre_hook(_put_names_back)
    return optimizer


def _put_names_back(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """States that torchtitan built by the live groups' names are those groups'."""
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    named = [{"param_names": list(ours["param_names"]), **saved} for saved, ours in pairs]
    return {**state_dict, "param_groups": named}
