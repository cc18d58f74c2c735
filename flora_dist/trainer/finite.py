# SPDX-License-Identifier: Apache-2.0
"""Whether the numbers of a run are finite: losses, weights, state; every process hears the same."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch

from flora_dist.trainer.backend import sum_over_processes
from flora_dist.trainer.replicated import World, local_part

_LOSSES = {"loss": "the training loss", "validation_loss": "the validation loss"}


class Finite:
    """Watches the numbers of one optimizer's run.

    A loss that only its own process knows goes with the message before the next step, so it costs
    neither a message nor a wait; those in the metrics are known to all.
    """

    fault: str | None
    """What the run has to end for, the same words on every process; None: nothing."""

    def __init__(self, world: World, *, stops: bool) -> None:
        """`stops`: as `train.stop_at_nan` says; False: only checkpoints are watched."""
        self.fault = None
        self._world, self._stops = world, stops
        self._flag = torch.zeros((), dtype=torch.int64, device=world.device)

    def note(self, losses: torch.Tensor) -> None:
        """Keep whether this process's sum of losses of a step is finite; waits for no device."""
        if self._stops:
            self._flag = (~losses.isfinite()).long()

    @property
    def flag(self) -> torch.Tensor:
        """1 where this process's last losses were not finite and the run ends for it, int64, ()."""
        return self._flag

    def see(self, step: int, record: Mapping[str, float | int | None]) -> None:
        """Look at the losses of a step that all processes know."""
        for key, name in _LOSSES.items():
            value = record.get(key)
            if value is not None and not math.isfinite(value):
                self._find(f"{name} of step {step} is {value}")

    def allow_save(self, step: int, values: Iterable[object]) -> bool:
        """Whether a checkpoint after a step would hold finite numbers; every process calls it.

        One that does not must not be written: `checkpoint.keep` would remove a sound one for it.
        `values` are this process's weights and optimizer state.
        """
        bad = torch.stack([self._flag, _count_not_finite(values, self._world.device)])
        losses, tensors = sum_over_processes(bad).tolist()
        if tensors:
            what = f"weights or optimizer state are not finite after step {step}"
            self._find(what)
            if not self._stops and self._world.speaks:
                warnings.warn(f"{what}: no checkpoint of them is written", stacklevel=2)
        return not losses and not tensors

    def _find(self, fault: str) -> None:
        if self._stops and self.fault is None:
            self.fault = fault


def tensors_in(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """What this process holds of the tensors among `values`, nested ones too."""
    for value in values:
        if isinstance(value, Mapping):  # flat layouts keep a state for each parameter of a tensor
            yield from tensors_in(value.values())
        elif isinstance(value, torch.Tensor):
            yield local_part(value)


def _count_not_finite(values: Iterable[object], device: torch.device) -> torch.Tensor:
    """How many of the tensors hold NaN or infinity, int64, ()."""
    # The extremes of a tensor tell, as NaN is one of both, and take no memory.
    extremes = [
        torch.stack(tensor.detach().aminmax()).isfinite().all().to(device)
        for tensor in tensors_in(values)
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not extremes:
        return torch.zeros((), dtype=torch.int64, device=device)
    return (~torch.stack(extremes)).sum()
