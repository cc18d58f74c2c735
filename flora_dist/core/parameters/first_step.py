# SPDX-License-Identifier: Apache-2.0
"""A first step that finds no gradient: the optimizer holds other tensors than those that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_dist.core.comm.groups import any_process
from flora_dist.core.parameters.trainable import Group, Trainable
from flora_dist.core.step.gradient import Gradient


class Beginner(Protocol):
    """The parts of an optimizer that are looked at."""

    @property
    def param_groups(self) -> list[Group]:
        """Settings, and what stands in the groups now."""

    @property
    def state(self) -> Any:
        """This rank's state."""


class Beginning:
    """Looks at an optimizer's steps until one has found a gradient."""

    def __init__(self) -> None:
        self.is_over = False

    @contextmanager
    def watched(
        self, slots: Sequence[Trainable], gradients: Sequence[Gradient], optimizer: Beginner
    ) -> Iterator[None]:
        """Around a step of ``slots``, with this rank's gradients.

        Raises:
            ValueError: on every rank, if none has a gradient of any parameter; nothing has changed.
        """
        before = _steps(slots, optimizer.state)
        yield
        # Asked first, whatever was counted here: others may hold parameters that counted nothing.
        found = _is_found(slots, gradients)
        self.is_over = found or before != _steps(slots, optimizer.state)
        if self.is_over or _only_asks(optimizer.param_groups, gradients):
            return
        if not any(step > 1 for step in before):
            optimizer.state.clear()  # zeros that this step made
        raise ValueError(_complaint(optimizer.param_groups, slots))


def _steps(slots: Sequence[Trainable], state: Mapping[Tensor, dict[str, Any]]) -> list[int]:
    """What each parameter counts. That follows from gradients on all ranks, so ranks agree."""
    return [slot.next_step(state[slot.tensor]) for slot in slots]


def _is_found(slots: Sequence[Trainable], gradients: Sequence[Gradient]) -> bool:
    """Whether a step that counted nothing was skipped for gradients that are not finite."""
    if not any(slot.config.skip_nonfinite for slot in slots):
        return False
    found = any(gradient is not None for gradient in gradients)
    if all(slot.part.reducer is None for slot in slots):
        return found
    # They may be on other ranks alone. All processes have just met, for the same setting.
    return any_process(torch.tensor(found, device=slots[0].tensor.device))


def _only_asks(groups: Sequence[Group], gradients: Sequence[Gradient]) -> bool:
    """Whether torch's DCP may have asked for state, by a step of rate 0 on zeros."""
    if any(gradient is not None for gradient in gradients):
        return True
    return all(bool(group["lr"] == 0) for group in groups)


def _complaint(groups: Sequence[Group], slots: Sequence[Trainable]) -> str:
    count = sum(len(group["params"]) for group in groups)
    idle = count - len({id(slot.tensor) for slot in slots})
    return (
        f"a first step must find a gradient; of {count} parameters none has one, on any rank, and "
        f"{idle} are frozen or empty. Was the optimizer built before the model was sharded, copied "
        "or given adapters? Build it from named_parameters() of the model that is trained, after "
        "wrapping, and call step() after backward. Where other parameters train first, call it "
        "once these have gradients."
    )
