# SPDX-License-Identifier: Apache-2.0
"""The optimizers the trainer knows, and the curves of their learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

from flora_dist.trainer.config import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]], *, seed: int
) -> torch.optim.Optimizer:
    """The optimizer over named parameters; the run's seed reaches those that take one.

    Raises:
        ValueError: an option the optimizer refuses, in the optimizer's own words.
    """
    options = dict(config.options)
    if "seed" in option_names(config.name):
        options.setdefault("seed", seed)
    try:
        return _optimizer_class(config.name)(list(named_parameters), **options)
    except TypeError as error:  # torch's optimizers compare options before they check them
        raise ValueError(
            f"{config.name} refuses its options {options}: {error}. Correct the optimizer section."
        ) from error


def schedule_factor(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """The learning rate's factor as a function of the number of steps done.

    Warm-up reaches 1 at step `warmup_steps`; the curve then falls from 1 to `final_ratio` at the
    last step.

    >>> factor = schedule_factor(ScheduleConfig(name="linear", warmup_steps=2, final_ratio=0.0), 6)
    >>> [round(factor(step), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.67, 0.33, 0.0]
    """
    curve = _CURVES[config.name]
    warmup, final = config.warmup_steps, config.final_ratio
    length = max(1, steps - 1 - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return curve(min(1.0, (step - warmup) / length), final)

    return factor


_CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda _, __: 1.0,
    "linear": lambda part, final: 1.0 - (1.0 - final) * part,
    "cosine": lambda part, final: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * part)),
}
