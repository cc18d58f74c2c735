# SPDX-License-Identifier: Apache-2.0
"""What one parameter's update is made from, and the phases every update has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_dist.optim.basis import Sketches
from flora_dist.optim.config import FloraConfig
from flora_dist.optim.gradient import SketchedGradient
from flora_dist.optim.part import Part, Terms
from flora_dist.optim.spec import Geometry
from flora_dist.optim.store import Store
from flora_dist.tiles import Cuts

# Floor of RMS(weight) under scale_parameter (Adafactor, arXiv 1804.04235, section 8).
SMALLEST_SCALE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One parameter at one step."""

    part: Part
    geometry: Geometry
    config: FloraConfig
    sketches: Sketches | None
    """None where the parameter is dense."""
    cuts: Cuts
    """Rows and blocks of the parameter that several ranks hold pieces of."""
    state: dict[str, Any]
    """The parameter's state: tensors as the host sees them, and numbers."""
    gradient: Tensor | SketchedGradient | None
    """Local elements, or their sketches; None if this rank has none."""
    lr: float | Tensor
    weight_decay: float | Tensor
    sign: float
    """-1 to maximize."""
    step: int
    """Count of this step among the parameter's real steps, from 1."""
    window: int
    """The momentum's window after this step."""
    beta2: float
    """Decay of the second moment at this step."""
    store: Store
    """Writes this step's results."""

    def local(self, name: str) -> Tensor:
        """A state tensor as the plain tensor of this rank."""
        return self.part.local(self.state[name])

    def count_step(self) -> None:
        """Commit the counters once the step is through."""
        self.state["step"] = self.step
        self.state["window"] = self.window

    def clip_factor(self, square_sum: Tensor, num_elements: int) -> Tensor:
        """1 / max(1, RMS / clip), without a copy to the host."""
        if self.config.clip is None:
            return torch.ones_like(square_sum)
        # Sums over shards can round a true zero to just below it.
        rms = (square_sum.clamp(min=0) / num_elements).sqrt()
        return 1 / (rms / self.config.clip).clamp(min=1)

    def rate(self, weight_square_sum: Tensor | None, num_elements: int) -> float | Tensor:
        """lr, times max(1e-3, RMS(weight)) under scale_parameter."""
        if weight_square_sum is None:
            return self.lr
        return self.lr * (weight_square_sum / num_elements).sqrt().clamp(min=SMALLEST_SCALE)


class Update(Protocol):
    """One parameter's step in phases; between them, terms are summed over the ranks."""

    job: Job

    def measure(self) -> Terms:
        """Terms of message 1. Changes nothing."""

    def is_finite(self) -> Tensor:
        """Whether this rank's gradient is finite (), after ``measure``."""

    def is_zero(self) -> Tensor:
        """Whether this rank's gradient is all zeros (), after ``measure``."""

    def couple(self, totals: Terms) -> Terms:
        """From the sums of message 1 to the terms of message 2; empty where none is needed."""

    def tally(self, totals: Terms) -> Terms:
        """From the sums of message 2 to the terms of message 3; empty where none is needed."""

    def finish(self, totals: Terms) -> None:
        """From the sums of message 3 to new weights and state."""


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider of float32 and the parameter's dtype."""
    return torch.promote_types(dtype, torch.float32)
