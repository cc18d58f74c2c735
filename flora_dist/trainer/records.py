# SPDX-License-Identifier: Apache-2.0
"""What is known after a step: its loss and norm, how fast the run is, and what memory it took."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

import torch

from flora_dist.trainer.backend import sum_over_processes
from flora_dist.trainer.metrics import Record
from flora_dist.trainer.replicated import World

_LARGEST_EXPONENT = 700.0  # exp beyond it is no float


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One optimizer step that was taken."""

    step: int
    """Its number, from 1."""
    losses: torch.Tensor
    """This process's sum of losses, a float64 scalar."""
    tokens: int
    """Labels that counted in the global batch."""
    lr: float
    """Learning rate it was taken with."""
    norm: float | None
    """Of its gradient, before clipping; None where it was not taken."""


class Clock:
    """Time of the steps, and tokens per second, from settled steps as soon as there are any."""

    seconds: float
    """Of all steps of the run, those before a resume included; without evaluation and saving."""

    def __init__(self, before: float) -> None:
        """`before`: seconds of the steps before a resume."""
        self.seconds = before
        self._settled = False
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float, *, settled: bool) -> None:
        """A step on so many tokens; `settled`: it took as long as those behind it will."""
        if settled and not self._settled:
            self._settled, self._tokens, self._seconds = True, 0, 0.0
        self._tokens += tokens
        self._seconds += seconds
        self.seconds += seconds

    @property
    def rate(self) -> float | None:
        """Tokens per second, of all processes."""
        return self._tokens / self._seconds if self._seconds else None


def training_record(
    taken: Taken, clock: Clock, world: World, *, steps: int, load: float | None
) -> Record:
    """What is known after a step, of the `steps` of the run; every process calls it.

    `load`: seconds that a token takes one device at its peak; None: not known.
    """
    loss = float(sum_over_processes(taken.losses)) / taken.tokens
    rate, left = clock.rate, steps - taken.step
    record: Record = {"loss": loss, "lr": taken.lr, "tokens": taken.tokens}
    if taken.norm is not None:
        record["gradient_norm"] = taken.norm
    timed: Record = {
        "tokens_per_second": rate,
        "tokens_per_second_per_device": None if rate is None else rate / world.size,
        "eta_seconds": None if rate is None else left * taken.tokens / rate,
        "peak_memory_bytes": peak_memory(world.device),
    }
    if load is not None:
        timed["mfu"] = None if rate is None else load * rate / world.size
    return record | timed


def validation_record(loss: float) -> Record:
    """A validation loss in nats per token, and what is computed from it."""
    perplexity = math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf
    return {"validation_loss": loss, "validation_perplexity": perplexity}


def peak_memory(device: torch.device) -> int:
    """Bytes this process had at most: those torch had on its GPU, or all of it on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
