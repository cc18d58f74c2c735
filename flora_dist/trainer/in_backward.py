# SPDX-License-Identifier: Apache-2.0
"""Steps in backward: where a config cannot have them, and what the loop sees of a model then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from flora_dist.flora import Flora
from flora_dist.gradients.in_backward import step_in_backward
from flora_dist.trainer.config import DENSE, Config
from flora_dist.trainer.replicated import Spread, World

_LEVELS = {
    "none": (DENSE, "compressed", "sharded"),
    "fsdp2": (DENSE, "sharded"),
    "hsdp": (DENSE, "sharded"),
}
"""Backend -> levels at which a gradient is complete in backward."""


def check_in_backward(config: Config, world: World) -> None:
    """Refuse what cannot step in backward, or would gain nothing.

    Raises:
        ValueError: another optimizer than Flora, a backend or level whose gradients are complete
            after backward alone, clipping, or dense gradients of several micro-batches.
    """
    train, backend, level = config.train, config.backend.name, config.gradients.level
    if not train.step_in_backward:
        return
    if config.optimizer.name != "flora":
        raise ValueError(
            f"train.step_in_backward needs Flora; optimizer.name={config.optimizer.name!r}. Set "
            "optimizer.name: flora, or step_in_backward: false."
        )
    if level not in _LEVELS.get(backend, ()):
        possible = "; ".join(f"{name} with {' or '.join(own)}" for name, own in _LEVELS.items())
        raise ValueError(
            "train.step_in_backward needs gradients that are complete in backward; those of "
            f"backend.name={backend!r} with gradients.level={level!r} are complete after it. Use "
            f"{possible}."
        )
    if train.max_grad_norm is not None:
        raise ValueError(
            "train.step_in_backward frees gradients before their norm is known; "
            f"train.max_grad_norm={train.max_grad_norm!r}. Set it to null: optimizer.clip, which "
            "goes by matrix, stays."
        )
    if level == DENSE and train.global_batch != train.micro_batch * world.size:
        raise ValueError(
            "train.step_in_backward frees nothing where dense gradients of several micro-batches "
            f"are added up; train.global_batch={train.global_batch} is not train.micro_batch x "
            f"processes = {train.micro_batch * world.size}. Raise micro_batch, or set "
            f"gradients.level: {_LEVELS[backend][1]}."
        )


def in_backward(spread: Spread, optimizer: torch.optim.Optimizer, config: Config) -> Spread:
    """The model with steps in backward, if the config wants them of this optimizer."""
    if not config.train.step_in_backward or not isinstance(optimizer, Flora):
        return spread
    handle = step_in_backward(spread.module, optimizer)

    @contextmanager
    def synchronising(last: bool) -> Iterator[None]:
        # Each micro-batch is reduced: without that, FSDP2 would add up whole gradients.
        with spread.synchronising(True):
            if last:
                yield
                return
            with handle.accumulating():
                yield

    def close() -> None:
        handle.remove()
        spread.close()

    return replace(spread, synchronising=synchronising, norm=lambda _: None, close=close)
