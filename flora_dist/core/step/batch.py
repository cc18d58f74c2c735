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
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_dist.core.protocols import Layout, Part, Reducer, Terms
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Basis, BatchSketches, Sketches
from flora_dist.core.step.gradient import Gradient
from flora_dist.core.tiles import Cuts, Interval, Tile


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One parameter of a batch, as plain tensors of this rank."""

    name: str
    """Canonical, equal on all ranks."""
    tensor: Tensor
    """What stands in the optimizer's group: the parameter, or a flat tensor that holds it."""
    part: Part
    layout: Layout
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
    matrices: Interval
    """Matrices of the batch of which something is here."""
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Parameters of one shape, dtype, settings and group of ranks; never empty.

    A batch of several members holds only such whose part is one tile, equal for all, or none.
    """

    members: tuple[Member, ...]
    geometry: Geometry
    """Of each member, as are all facts below."""
    config: FloraConfig
    sign: float
    """-1 to maximize."""
    dtype: torch.dtype
    """Of the arithmetic: the wider of float32 and the parameters' dtype."""
    device: torch.device
    sketches: BatchSketches | None
    """None where the momentum is dense, or there is none."""
    reducer: Reducer | None
    """Who holds the rest of these parameters."""
    sources: tuple[tuple[int, tuple[int, int, int]], ...]
    """Where each tile begins among a member's local elements, and its E, N, W."""
    matrices_here: int
    """Matrices of each member that this rank holds some of."""
    matrices_summed: int
    """Matrices of each member in sums over ranks; where all are whole, those that are here."""
    held: slice
    """Those that are here among all that are summed, of the whole batch."""
    elements_per_matrix: int
    """N M."""
    gain: float
    """Weight of the momentum under "blend", "ademamix" and "subspace_adam"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moment:
    """One step of a batch: what changes from step to step."""

    gradients: Sequence[Gradient]
    """Of each member; all are dense, or all sketched, or one member has none."""
    is_missing: bool
    """Whether this rank has no gradient: it counts as zero."""
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

    def take_rows(self, now: Moment, measured: Any) -> None:
        """Add what follows from cut rows to the terms of message 1, once peers gave the rows."""

    def couple(self, now: Moment, measured: Any, totals: Terms) -> Any:
        """From the sums of message 1 to the terms of message 2; no terms where none is needed."""

    def tally(self, now: Moment, coupled: Any, totals: Terms) -> Any:
        """From the sums of message 2 to the terms of message 3; no terms where none is needed."""

    def finish(self, now: Moment, tallied: Any, totals: Terms) -> None:
        """From the sums of message 3 to new weights and state."""


class Across(Protocol):
    """All phases of some batches by two calls, where one message of sums travels between them."""

    @property
    def terms(self) -> Sequence[Terms]:
        """Of each batch, in memory that stays; ``measure`` fills them in, and sums replace them."""

    def measure(self, moments: Sequence[Moment]) -> Any:
        """Fill in the terms of message 1; returns what ``finish`` is to be given."""

    def take_rows(self, begun: Any) -> None:
        """Add what follows from cut rows to the terms, once peers gave the rows."""

    def finish(self, begun: Any) -> None:
        """From the sums of message 1 to new weights and state."""


class AtOnce(Protocol):
    """All phases of some batches, of which each has a gradient."""

    def __call__(self, moments: Sequence[Moment]) -> None:
        """The whole step, where no sums have to travel."""

    def across(self) -> Across | None:
        """The step where sums travel; None where one message is not enough."""


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider of float32 and the parameter's dtype."""
    return torch.promote_types(dtype, torch.float32)
