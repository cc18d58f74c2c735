# SPDX-License-Identifier: Apache-2.0
"""Parameters that are stepped together, and the four phases of their step.

Parameters of one shape, dtype, group and group of ranks form a batch: their matrices stand along
one axis E, as the experts of a 3-D parameter do, so that a step costs a few calls per batch and
not per parameter. The memory stays where the framework has it: a batch lists its members' tensors.

Shape suffixes: E matrices of all members, N rows, M columns, K blocks per row, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from flora_dist.optim.basis import Basis, DenseBasis
from flora_dist.optim.config import FloraConfig, beta2_at
from flora_dist.optim.gradient import Gradient
from flora_dist.optim.part import Part, Reducer, Terms
from flora_dist.optim.sketches import BatchSketches, Sketches
from flora_dist.optim.spec import Geometry
from flora_dist.tiles import Cuts, Tile

# Floor of RMS(weight) under scale_parameter (Adafactor, arXiv 1804.04235, section 8).
SMALLEST_SCALE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One parameter of a batch, as plain tensors of this rank."""

    part: Part
    geometry: Geometry
    config: FloraConfig
    group: Mapping[str, Any]
    """The parameter group, for what changes from step to step: lr and weight_decay."""
    name_key: int
    """What its random numbers follow from."""
    sketches: Sketches | None
    """The matrices of the momentum; None where it is dense, or there is none."""
    tiles: tuple[Tile, ...]
    """What of the parameter is here, in the memory order of ``weight``."""
    cuts: Cuts
    """Rows and blocks of the parameter that several ranks hold pieces of."""
    state: dict[str, Any]
    """The parameter's state as the host sees it: tensors and numbers."""
    kept: Mapping[str, Tensor]
    """The state's tensors as the host sees them, when the plan was made."""
    local: Mapping[str, Tensor]
    """The same as plain tensors of this rank."""
    weight: Tensor
    """The local elements, sharing the parameter's memory."""
    address: int
    """Of the weight."""
    local_addresses: tuple[int, ...]
    """Of the state's tensors."""

    @property
    def name(self) -> str:
        """Of the parameter, canonical."""
        return self.part.name

    def is_current(self, state: Mapping[str, Any]) -> bool:
        """Whether weight and state, given as it is now, are those that the plan was made for."""
        if state is not self.state:
            return False
        for name, tensor in self.kept.items():
            if state.get(name) is not tensor:
                return False
        for tensor, address in zip(self.local.values(), self.local_addresses, strict=True):
            if tensor.data_ptr() != address:
                return False
        return self.part.address() == self.address


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Parameters of one shape, dtype, settings and group of ranks; never empty.

    A batch of several members holds only such whose part is one tile, equal for all.
    """

    members: tuple[Member, ...]
    geometry: Geometry
    """Of each member."""
    config: FloraConfig
    sign: float
    """-1 to maximize."""
    dtype: torch.dtype
    """Of the arithmetic: the wider of float32 and the parameters' dtype."""
    device: torch.device
    sketches: BatchSketches | None
    """None where the momentum is dense, or there is none."""

    @property
    def part(self) -> Part:
        """The first member's; tiles, cuts and ranks of the others are like it."""
        return self.members[0].part

    @property
    def cuts(self) -> Cuts:
        """The first member's; of the others too."""
        return self.members[0].cuts

    @property
    def reducer(self) -> Reducer | None:
        """Who holds the rest of these parameters."""
        return self.members[0].part.reducer

    @property
    def matrices_here(self) -> int:
        """Matrices of each member that this rank holds some of."""
        first, last = self.part.matrices
        return last - first

    @property
    def matrices_summed(self) -> int:
        """Matrices of each member in sums over ranks; where all are whole, those that are here."""
        return self.geometry.num_matrices if self.part.splits_matrices else self.matrices_here

    @property
    def held(self) -> slice:
        """Those that are here among all that are summed, of the whole batch."""
        if len(self.members) > 1 or not self.part.splits_matrices:
            return slice(0, len(self.members) * self.matrices_here)
        return slice(*self.part.matrices)

    @property
    def elements_per_matrix(self) -> int:
        """N M."""
        return self.geometry.num_rows * self.geometry.num_columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moment:
    """One step of a batch: what changes from step to step."""

    gradients: Sequence[Gradient]
    """Of each member; all are dense, or all sketched, or one member has none."""
    lr: float | Tensor
    weight_decay: float | Tensor
    step: int
    """Count of this step among the parameters' real steps, from 1."""
    window: int
    """The momentum's window after this step."""
    beta2: float
    """Decay of the second moment at this step."""
    basis: Basis
    """Of the momentum, before and after this step."""

    @property
    def is_missing(self) -> bool:
        """Whether this rank has no gradient: it counts as zero."""
        return self.gradients[0] is None

    def clip_factor(self, square_sum_H: Tensor, batch: Batch) -> Tensor:
        """1 / max(1, RMS / clip) of each matrix (H,), without a copy to the host."""
        if batch.config.clip is None:
            return torch.ones_like(square_sum_H)
        # Sums over shards can round a true zero to just below it.
        rms_H = (square_sum_H.clamp(min=0) / batch.elements_per_matrix).sqrt()
        return 1 / (rms_H / batch.config.clip).clamp(min=1)

    def rate(self, weight_square_sum_H: Tensor | None, batch: Batch) -> float | Tensor:
        """lr; under scale_parameter times max(1e-3, RMS(weight)) of each matrix (H,)."""
        if weight_square_sum_H is None:
            return self.lr
        rms_H = (weight_square_sum_H / batch.elements_per_matrix).sqrt()
        return self.lr * rms_H.clamp(min=SMALLEST_SCALE)


class Stage(Protocol):
    """What a phase has found out, for the next one."""

    @property
    def terms(self) -> Terms:
        """To be summed over the ranks: per name one row of numbers for each member."""


T = TypeVar("T")


class Phases(Protocol):
    """How a batch is stepped; between phases, terms are summed over the ranks.

    Made once for a batch. Only ``finish`` changes anything. What a phase returns is handed to the
    next one, with the sums of its terms. Every implementation gives the same results to rounding.
    """

    def measure(self, now: Moment) -> Any:
        """The terms of message 1."""

    def is_finite(self, measured: Any) -> Tensor:
        """Whether this rank's gradients are finite (), and their squares."""

    def is_zero(self, measured: Any) -> Tensor:
        """Whether this rank's gradients are all zeros ()."""

    def couple(self, now: Moment, measured: Any, totals: Terms) -> Any:
        """From the sums of message 1 to the terms of message 2; no terms where none is needed."""

    def tally(self, now: Moment, coupled: Any, totals: Terms) -> Any:
        """From the sums of message 2 to the terms of message 3; no terms where none is needed."""

    def finish(self, now: Moment, tallied: Any, totals: Terms) -> None:
        """From the sums of message 3 to new weights and state."""


def moment_of(batch: Batch, gradients: Sequence[Gradient]) -> Moment:
    """A batch at its coming step."""
    state, group, config = batch.members[0].state, batch.members[0].group, batch.config
    step, old_window = int(state["step"]) + 1, int(state["window"])
    window = step // config.kappa
    basis: Basis = DenseBasis()
    if batch.sketches is not None:
        basis = batch.sketches.change(old_window, window, dtype=batch.dtype, device=batch.device)
    return Moment(
        gradients=gradients,
        lr=_number(group["lr"]),
        weight_decay=_number(group["weight_decay"]),
        step=step,
        window=window,
        beta2=beta2_at(step, config.beta2),
        basis=basis,
    )


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider of float32 and the parameter's dtype."""
    return torch.promote_types(dtype, torch.float32)


def count_step(batch: Batch, now: Moment) -> None:
    """Commit the counters once a step is through."""
    for member in batch.members:
        member.state["step"] = now.step
        member.state["window"] = now.window


def _number(value: float | Tensor) -> float | Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else value
