# SPDX-License-Identifier: Apache-2.0
"""The optimizers the trainer knows, and the curves of their learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from flora_dist.trainer.config import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

_FSDP1 = "_fsdp_wrapped_module."  # what it puts into names
LABELS = {"flora": "Flora", "adamw": "AdamW", "adafactor": "Adafactor"}


def _optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    import torch

    if name == "flora":
        from flora_dist import Flora

        return Flora
    theirs: dict[str, type[torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adafactor": torch.optim.Adafactor,
    }
    return theirs[name]


@cache
def option_names(name: str) -> tuple[str, ...]:
    """Keyword arguments of the named optimizer, in its own order, without the parameters."""
    parameters = inspect.signature(_optimizer_class(name)).parameters
    return tuple(key for key in parameters if key != "params")


def build_optimizer(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    seed: int,
    vectors: Container[str] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over named parameters; the run's seed reaches those that take one.

    `vectors`: names of the parameters that are no matrices, where FSDP1 has made all of them flat;
    None: those of fewer than two dimensions.

    Raises:
        ValueError: an option the optimizer refuses, in the optimizer's own words.
    """
    options = dict(config.options)
    if "seed" in option_names(config.name):
        options.setdefault("seed", seed)
    try:
        return _optimizer_class(config.name)(_groups(config, named_parameters, vectors), **options)
    except TypeError as error:  # torch's optimizers compare options before they check them
        raise ValueError(
            f"{config.name} refuses its options {options}: {error}. Correct the optimizer section."
        ) from error


def _groups(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    known: Container[str] | None,
) -> list[Any]:
    """Named parameters, those that must not shrink in a group of their own."""
    named = list(named_parameters)
    default = inspect.signature(_optimizer_class(config.name)).parameters["weight_decay"].default
    if config.decay == "all" or not config.options.get("weight_decay", default):
        return named
    matrices: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    for name, p in named:
        is_vector = p.ndim < 2 if known is None else name.replace(_FSDP1, "") in known
        (vectors if is_vector else matrices).append((name, p))
    groups: tuple[dict[str, Any], ...] = (
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def schedule_factor(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """The learning rate's factor as a function of the number of steps done.

    Warm-up reaches 1 at step `warmup_steps`; the curve then falls from 1 to `final_ratio` at the
    last step, wsd's only in the last `decay_steps` (arXiv 2404.06395, section 4).

    >>> factor = schedule_factor(ScheduleConfig(name="linear", warmup_steps=2, final_ratio=0.0), 6)
    >>> [round(factor(step), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.67, 0.33, 0.0]
    >>> factor = schedule_factor(ScheduleConfig(name="wsd", decay_steps=2, final_ratio=0.0), 6)
    >>> [round(factor(step), 2) for step in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    curve = _CURVES[config.name]
    warmup, final = config.warmup_steps, config.final_ratio
    begin = warmup
    if config.name == "wsd":
        begin = max(warmup, steps - 1 - (config.decay_steps or max(1, steps // 10)))
    length = max(1, steps - 1 - begin)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return curve(min(1.0, max(0, step - begin) / length), final)

    return factor


_CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda _, __: 1.0,
    "linear": lambda part, final: 1.0 - (1.0 - final) * part,
    "wsd": lambda part, final: 1.0 - (1.0 - final) * part,
    "cosine": lambda part, final: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * part)),
}
