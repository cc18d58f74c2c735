# SPDX-License-Identifier: Apache-2.0
"""Flat tensors: DeepSpeed ZeRO and FSDP1, where ranks own spans of parameters laid in one line.

A span may cut its first and last row, and blocks inside them. A cut row's gradient travels to all
who hold a piece of it: one row at most for each boundary between two spans. Every holder of a cut
block keeps its state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.protocols import Part, Reducer
from flora_dist.core.state.spec import StateTensor, grid_of, matrix_sizes
from flora_dist.core.tiles import (
    Cuts,
    Interval,
    Tile,
    find_cuts,
    find_shared_cuts,
    tiles_of_span,
)

Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""Names and whole shapes of parameters, in the order of the flat tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What each rank of a group owns of one parameter, and where this rank's share is."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    owned: tuple[Interval, ...]
    """Each rank's elements of the row-major parameter, in the order of ranks; empty if none."""
    offset: int
    """Of this rank's first element in its flat tensor."""
    model: Tensor | None = field(default=None, compare=False, repr=False)
    """The model's own parameter, which may be frozen alone; None: the flat tensor speaks for it."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FlatPart:
    """The elements of one parameter in a flat tensor of this rank."""

    span: Span
    rank: int
    """This rank's place among the owners."""
    flat: Tensor
    tiles: tuple[Tile, ...]
    num_elements: int
    reducer: Reducer | None
    """None: the group has one rank, which owns everything."""
    apart: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Gradients, by parameter, that the host keeps outside of the flat tensor's own."""

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.span.shape

    @property
    def trains(self) -> bool:
        model = self.flat if self.span.model is None else self.span.model
        return model.requires_grad

    @property
    def matrices(self) -> Interval:
        return (self.tiles[0].matrices[0], self.tiles[-1].matrices[1]) if self.tiles else (0, 0)

    @property
    def splits_matrices(self) -> bool:
        return self.reducer is not None

    @property
    def column_shards(self) -> int:
        return 1

    def cuts(self, block: int) -> Cuts:
        grid = grid_of(self.shape, block)
        if len(self.span.owned) > 2:
            return find_shared_cuts(self.span.owned, self.rank, grid)
        # Two ranks share every cut, so what they would exchange is the sum over all ranks: it
        # travels with the other sums, and a message is saved.
        tiles = [t for owned in self.span.owned for t in _tiles(self.shape, owned)]
        return replace(find_cuts(tiles, grid), are_few=True)

    def weight(self) -> Tensor:
        return self._own(self.flat.detach())

    def address(self) -> int:
        return self.flat.data_ptr()

    def gradient(self) -> Tensor | None:
        if self.flat.grad is None:
            return None
        apart = self.apart.get(self.name)
        return self._own(self.flat.grad) if apart is None else apart

    def _own(self, flat: Tensor) -> Tensor:
        own = flat[self.span.offset : self.span.offset + self.num_elements]
        if own.numel() != self.num_elements:
            raise ValueError(
                "a flat tensor must keep the size it had when it was attached; that of "
                f"{self.name!r} has {flat.numel()} elements, and the parameter's end at "
                f"{self.span.offset + self.num_elements}. Do not replace weights in place; build "
                "and attach the engine and its optimizer anew."
            )
        return own

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        if entry.along == "elements":
            return (self.num_elements,)
        if entry.along == "columns":
            first, last = self.matrices
            return (last - first, entry.shape[-1])
        entries = sum(tile.num_blocks(entry.block) for tile in self.tiles)
        return (entries,) if entry.name == "row" else (entries, entry.shape[-1])

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.local_state_shape(entry), dtype=dtype, device=self.flat.device)

    def local(self, state: Tensor) -> Tensor:
        return state


class FlatLayout:
    """Knows the flat tensors of one rank by identity; claims no others."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[FlatPart, ...]] = {}
        self._nested: set[int] = set()

    def add(
        self, flat: Tensor, spans: Sequence[Span], *, rank: int, reducer: Reducer | None
    ) -> None:
        """Make a flat tensor known; its parameters' states stand by name in its own.

        Args:
            flat: 1-D, whatever parameters it holds elements of.
            spans: all parameters that any rank of the group holds in its tensor, even if this
                one holds nothing of them; order and names equal on all ranks.
            rank: this rank's place in ``owned`` of each span.
            reducer: sums over the group; None if it has one rank.
        """
        self._nested.add(id(flat))
        self._parts[id(flat)] = tuple(_parts(flat, spans, rank, reducer))

    def add_view(self, view: Tensor, span: Span, *, rank: int, reducer: Reducer | None) -> None:
        """Make a 1-D tensor known that holds elements of one parameter, and its state as it is."""
        self._parts[id(view)] = tuple(_parts(view, [span], rank, reducer))

    def claims(self, tensor: Tensor) -> bool:
        known = self._parts.get(id(tensor))
        return known is not None and all(part.flat is tensor for part in known)

    def parts(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        del name  # the host's groups name flat tensors by what stood there before, if at all
        return self._parts[id(tensor)]

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        assert isinstance(part, FlatPart)
        if id(part.flat) not in self._nested:
            return state
        # DeepSpeed's swapper takes top-level tensors for elements of the partition.
        own: dict[str, Any] = state.get(part.name, {})
        return own


def _parts(
    flat: Tensor, spans: Iterable[Span], rank: int, reducer: Reducer | None
) -> Iterable[FlatPart]:
    for span in spans:
        start, stop = span.owned[rank]
        yield FlatPart(
            span=span,
            rank=rank,
            flat=flat,
            tiles=_tiles(span.shape, (start, stop)),
            num_elements=stop - start,
            reducer=reducer,
        )


def _tiles(shape: tuple[int, ...], owned: Interval) -> tuple[Tile, ...]:
    _, rows, columns = matrix_sizes(shape)
    start, stop = owned
    if start == stop:
        return ()
    return tiles_of_span(start, stop, num_rows=rows, num_columns=columns)


def cut_line(
    shapes: Shapes, *, offsets: Sequence[int], size: int, rank: int, world_size: int
) -> tuple[Span, ...]:
    """Parameters laid in one line, which is cut in partitions of ``size`` elements.

    >>> [span.owned for span in cut_line(
    ...     [("a", (2, 3)), ("b", (4,))], offsets=[0, 6], size=5, rank=1, world_size=2)]
    [((0, 5), (5, 6)), ((0, 0), (0, 4))]
    """
    bounds = [size * place for place in range(world_size + 1)]
    spans = []
    for (name, shape), offset in zip(shapes, offsets, strict=True):
        inside = [min(max(bound - offset, 0), math.prod(shape)) for bound in bounds]
        spans.append(
            Span(
                name=name,
                shape=shape,
                owned=tuple(itertools.pairwise(inside)),
                offset=max(0, offset - bounds[rank]),
            )
        )
    return tuple(spans)


def cut_each(shapes: Shapes, *, sizes: Sequence[int], world_size: int) -> tuple[Span, ...]:
    """Each parameter cut in chunks of its own size, a rank's chunks padded and laid in a line.

    >>> [(span.owned, span.offset) for span in cut_each(
    ...     [("a", (2, 3)), ("b", (3,))], sizes=[4, 2], world_size=2)]
    [(((0, 4), (4, 6)), 0), (((0, 2), (2, 3)), 4)]
    """
    spans, offset = [], 0
    for (name, shape), size in zip(shapes, sizes, strict=True):
        bounds = [min(size * place, math.prod(shape)) for place in range(world_size + 1)]
        owned = tuple(itertools.pairwise(bounds))
        spans.append(Span(name=name, shape=shape, owned=owned, offset=offset))
        offset += size
    return tuple(spans)
