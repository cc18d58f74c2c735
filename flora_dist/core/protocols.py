# SPDX-License-Identifier: Apache-2.0
"""What the optimizer asks of the framework that holds the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_dist.core.state.spec import StateTensor
from flora_dist.core.tiles import Cuts, Interval, Tile

Terms = dict[str, Tensor]
"""Named plain tensors that one parameter contributes to a message; a sum over ranks keeps them."""
WHOLE_ROWS = ("elements", "products")
"""Terms that hold whole cut rows of ``Part.cuts`` (parameters, rows, columns), where these are few:
each rank fills in the columns that it has. Only ranks that share a row need it."""


class Reducer(Protocol):
    """Sums a message over the ranks that hold the other parts of the same parameters.

    Parameters whose reducers are equal travel in one message, so reducers compare by value.
    """

    def __hash__(self) -> int: ...

    def sum_(self, message_S: Tensor) -> None:
        """Replace a flat message by its sum over the ranks; every rank gets the same bits."""

    def exchange(self, sent_S: Tensor, sizes: Mapping[int, int]) -> Tensor:
        """Send each peer its share of a flat message; returns theirs, laid out alike.

        ``sizes``: numbers per peer, ascending by its place in the group; equal on both sides.
        Every rank of the group calls this, also with nothing to send.
        """

    @property
    def rank(self) -> int:
        """This rank's place in the group."""


class Part(Protocol):
    """The part of one named parameter that this rank holds, as plain local tensors."""

    @property
    def name(self) -> str:
        """Canonical name, equal on all ranks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """What of it is here, in the memory order of ``weight``; empty if nothing is."""

    @property
    def trains(self) -> bool:
        """Whether the model's parameter requires a gradient now; equal on all ranks."""

    @property
    def matrices(self) -> Interval:
        """Matrices of the batch whose statistics are here: all that any tile touches."""

    @property
    def splits_matrices(self) -> bool:
        """Whether several ranks may hold parts of one matrix; equal on all ranks."""

    @property
    def column_shards(self) -> int:
        """How many ranks a box of whole rows is cut among; 1 where columns are not sharded."""

    @property
    def reducer(self) -> Reducer | None:
        """None: every rank holds the whole parameter and the same gradient."""

    def cuts(self, block: int) -> Cuts:
        """Rows, and blocks of ``block`` columns, of which several ranks hold pieces."""

    def weight(self) -> Tensor:
        """The local elements, sharing memory with the parameter."""

    def address(self) -> int:
        """Where the memory of the local elements begins; another number once it is replaced."""

    def gradient(self) -> Tensor | None:
        """The local elements of the gradient, shaped like ``weight``; None if there is none."""

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        """Shape of this rank's piece of a state tensor."""

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        """A state tensor of zeros for this part, as the host framework wants to see it."""

    def local(self, state: Tensor) -> Tensor:
        """The plain local tensor inside a state tensor, sharing its memory."""


class Layout(Protocol):
    """One way of holding parameters."""

    def claims(self, tensor: Tensor) -> bool:
        """Whether this layout knows how ``tensor`` is held."""

    def parts(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        """The parameters in ``tensor``: itself, or those whose spans a flat partition holds."""

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        """``part``'s state in that of its tensor: that itself, or what stands under its name.

        Changes nothing: a new dict where there is none under the name yet.
        """
