# SPDX-License-Identifier: Apache-2.0
"""The canonical form of weights and state: boxes of whole tensors, whatever the layout (format v1).

A canonical tensor is the whole parameter's, in the coordinates of its matrices: elements (E, N, M),
momentum (E, N, K, R), row (E, N), column (E, M). E is left out unless the parameter is a batch, N
too where it is 1-D. What a rank holds of it are boxes.

Shape suffixes: E matrices, N rows, M columns, K blocks, R rank, W columns here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from flora_dist.core.protocols import Part
from flora_dist.core.state.spec import Geometry, StateTensor, is_batch, matrix_sizes
from flora_dist.core.step.views import as_batches, carve, momentum_batches
from flora_dist.core.tiles import Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Consecutive entries of a canonical tensor."""

    offsets: tuple[int, ...]
    """Of the first entry, one per dim of the canonical tensor."""
    values: Tensor
    """They themselves, sharing memory with what the rank holds wherever that is contiguous."""


def elements_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter's elements in the canonical form.

    >>> [elements_shape(s) for s in ((), (5,), (4, 5), (3, 4, 16), (8, 3, 2, 2))]
    [(1,), (5,), (4, 5), (3, 4, 16), (8, 12)]
    """
    return matrix_sizes(shape)[_dropped(shape) :]


def entry_shape(entry: StateTensor, geometry: Geometry) -> tuple[int, ...]:
    """Shape of a state tensor in the canonical form."""
    return elements_shape(geometry.shape) if entry.along == "elements" else entry.shape


def element_boxes(shape: tuple[int, ...], tiles: Sequence[Tile], local: Tensor) -> list[Box]:
    """What a rank holds of a parameter's elements; no two ranks hold a part of one another's."""
    dropped = _dropped(shape)
    batches = as_batches(local, tiles, shape=shape)
    starts = [(t.matrices[0], t.rows[0], t.columns[0]) for t in tiles]
    return [_box(start, batch, dropped) for start, batch in zip(starts, batches, strict=True)]


def state_boxes(part: Part, geometry: Geometry, entry: StateTensor, local: Tensor) -> list[Box]:
    """Everything that a rank holds of a state tensor, to be read into."""
    return [box for box, _ in _with_owned(part, geometry, entry, local)]


def owned_boxes(part: Part, geometry: Geometry, entry: StateTensor, local: Tensor) -> list[Box]:
    """What a rank saves of it: cut rows, blocks and matrices go to who holds their first element.

    All holders have equal values; replicas of a whole shard still save equal boxes.
    """
    owned = (own for _, own in _with_owned(part, geometry, entry, local))
    return [own for own in owned if own is not None and own.values.numel()]


def _with_owned(
    part: Part, geometry: Geometry, entry: StateTensor, local: Tensor
) -> Iterable[tuple[Box, Box | None]]:
    if entry.along == "elements":
        return ((box, box) for box in element_boxes(geometry.shape, part.tiles, local))
    if entry.along == "columns":
        return _columns(part, geometry, local)
    if entry.name == "row":
        return _rows(part, geometry, local)
    return _sketches(part, geometry, local)


def _sketches(part: Part, geometry: Geometry, local: Tensor) -> Iterator[tuple[Box, Box | None]]:
    """Momentum: (E, N, K, R); a block is saved by who holds its first column."""
    dropped = _dropped(geometry.shape)
    for tile, batch in zip(part.tiles, momentum_batches(local, part.tiles, geometry), strict=True):
        first, _ = tile.blocks(geometry.block)
        start = (tile.matrices[0], tile.rows[0], first, 0)
        begun_before = first * geometry.block < tile.columns[0]
        own_start = (*start[:2], first + begun_before, 0)
        own = _box(own_start, batch[:, :, int(begun_before) :], dropped)
        yield _box(start, batch, dropped), own


def _rows(part: Part, geometry: Geometry, local: Tensor) -> Iterator[tuple[Box, Box | None]]:
    dropped = _dropped(geometry.shape)
    batches = carve(local, [tile.sizes[:2] for tile in part.tiles])
    for tile, batch in zip(part.tiles, batches, strict=True):
        box = _box((tile.matrices[0], tile.rows[0]), batch, dropped)
        yield box, box if tile.columns[0] == 0 else None


def _columns(part: Part, geometry: Geometry, local: Tensor) -> Iterator[tuple[Box, Box | None]]:
    first, last = part.matrices
    if last == first:
        return
    dropped = _dropped(geometry.shape)
    batch = local.view(last - first, -1)
    begun = [t.matrices for t in part.tiles if t.rows[0] == 0 and t.columns[0] == 0]
    own = None
    if begun:  # of consecutive tiles, so the matrices that begin here are consecutive too
        start, stop = min(b[0] for b in begun), max(b[1] for b in begun)
        own = _box((start, 0), batch[start - first : stop - first], dropped)
    yield _box((first, 0), batch, dropped), own


def _dropped(shape: tuple[int, ...]) -> int:
    """Leading dims, matrices and rows, that a canonical tensor of this parameter goes without."""
    if is_batch(shape):
        return 0
    return 1 if len(shape) > 1 else 2


def _box(start: tuple[int, ...], batch: Tensor, dropped: int) -> Box:
    for _ in range(dropped):
        batch = batch.squeeze(0)
    return Box(offsets=start[dropped:], values=batch)
