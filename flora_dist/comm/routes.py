# SPDX-License-Identifier: Apache-2.0
"""Sketches of gradients over the network: one reduce-scatter or all-reduce per group, in buckets.

Every rank has sketches of full gradients; each keeps the mean of those its own tiles touch. For
each rank of a group there is a line of numbers: presence of each parameter, then what it keeps of
each, in the order of the parcels. A bucket is the same stretch of every line; lines are padded to
the longest. Shape suffixes: E matrices, N rows, K blocks, R rank of the sketch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.comm.groups import all_reduce_, group_device, reduce_scatter
from flora_dist.tiles import Tile

BUCKET_BYTES = 1 << 25
"""Largest buffer of one collective, all lines together: 32 MiB, as DDP's 25 MiB buckets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Who averages a parameter's sketches, and what each of those ranks keeps."""

    kept: tuple[tuple[Tile, ...], ...]
    """Tiles per rank of ``scatter``, in its order; without it, what everyone keeps."""
    scatter: dist.ProcessGroup | None = None
    """A reduce-scatter over these ranks; None: none."""
    sums: tuple[dist.ProcessGroup, ...] = ()
    """All-reduces after it, of what is kept: replicas."""
    divisor: float = 1.0
    """Of the sum: how many ranks it goes over."""

    @property
    def rank(self) -> int:
        """This rank's place in ``kept``."""
        return 0 if self.scatter is None else dist.get_rank(self.scatter)

    def numbers_sent(self, *, block: int, rank: int) -> int:
        """Numbers that this rank puts into the collectives of one step, for one parameter."""
        sizes = [sum(tile.num_blocks(block) for tile in tiles) * rank for tiles in self.kept]
        scattered = 0 if self.scatter is None else sum(sizes)
        return scattered + len(self.sums) * sizes[self.rank]

    @property
    def travels(self) -> bool:
        """Whether anything is sent."""
        return self.scatter is not None or bool(self.sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """One parameter's sketches on this rank."""

    route: Route
    tile: Tile | None
    """What of the parameter ``sums_ENKR`` is of; None if nothing is here."""
    sums_ENKR: Tensor | None
    """C; None: this rank had no gradient, and counts as zero."""
    block: int
    rank: int
    dtype: torch.dtype
    """Of the arithmetic: that of C."""
    device: torch.device
    """Where C is, or would be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """What this rank keeps of one parameter."""

    tiles: tuple[Tensor, ...]
    """Mean C (E, N, K, R) of each tile kept."""
    presence: Tensor | None
    """Above 0 if any rank had a gradient, (); None: this rank alone decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Some numbers of a line: one tile of one parcel."""

    parcel: int
    tile: Tile
    begin: int
    size: int


def carry(
    parcels: Sequence[Parcel], *, wire_dtype: torch.dtype | None, bucket_bytes: int = BUCKET_BYTES
) -> list[Arrived]:
    """Average sketches over the ranks of their routes.

    Args:
        parcels: in an order that is equal on all ranks, with equal routes but for ``rank``.
        wire_dtype: what travels; None: the dtype of C.
        bucket_bytes: largest buffer of a collective.
    """
    together: dict[tuple[object, ...], list[int]] = {}
    for index, parcel in enumerate(parcels):
        route = parcel.route
        key = (route.scatter, route.sums, route.divisor, parcel.dtype, parcel.device)
        together.setdefault(key, []).append(index)
    arrived: dict[int, Arrived] = {}
    for indices in together.values():
        chosen = [parcels[index] for index in indices]
        if chosen[0].route.travels:
            found = _Shipment(chosen, wire_dtype, bucket_bytes).send()
        else:
            found = [_stay(parcel) for parcel in chosen]
        arrived.update(zip(indices, found, strict=True))
    return [arrived[index] for index in range(len(parcels))]


def _stay(parcel: Parcel) -> Arrived:
    """Nobody else: what is kept is what is here."""
    tiles = parcel.route.kept[0] if parcel.sums_ENKR is not None else ()
    return Arrived(tiles=tuple(_part(parcel, tile).contiguous() for tile in tiles), presence=None)


class _Shipment:
    """Parcels of one group of ranks."""

    def __init__(
        self, parcels: Sequence[Parcel], wire_dtype: torch.dtype | None, bucket_bytes: int
    ) -> None:
        first = parcels[0]
        self._parcels, self._route = parcels, first.route
        self._dtype, self._wire = first.dtype, wire_dtype or first.dtype
        self._device, self._bucket_bytes = first.device, bucket_bytes
        self._lines = [list(self._runs(rank)) for rank in range(len(first.route.kept))]

    def send(self) -> list[Arrived]:
        """One collective per bucket and group; returns this rank's share of each parcel."""
        header = len(self._parcels)
        lengths = [line[-1].begin + line[-1].size if line else header for line in self._lines]
        mine = torch.empty(lengths[self._route.rank], dtype=self._dtype, device=self._device)
        width = self._bucket_bytes // (self._wire.itemsize * len(self._lines))
        for start in range(0, max(lengths), max(1, width)):
            stop = min(start + max(1, width), max(lengths))
            received = self._send_bucket(start, stop)
            end = min(stop, len(mine))
            if start < end:
                mine[start:end] = received[: end - start].to(self._dtype)
        mine /= self._route.divisor
        return self._unpack(mine)

    def _send_bucket(self, start: int, stop: int) -> Tensor:
        bucket = torch.zeros(len(self._lines), stop - start, dtype=self._wire, device=self._device)
        for row, line in zip(bucket, self._lines, strict=True):
            self._fill(row, line, start, stop)
        group = self._route.scatter or self._route.sums[0]
        there = bucket.to(group_device(bucket, group))
        received = there.view(-1)
        if self._route.scatter is not None:
            received = reduce_scatter(there, self._route.scatter)
        for replicas in self._route.sums:
            all_reduce_(received, replicas)
        return received.to(self._device)

    def _fill(self, row: Tensor, line: Sequence[_Run], start: int, stop: int) -> None:
        """Numbers [start, stop) of a line."""
        for index in range(start, min(len(self._parcels), stop)):
            row[index - start] = float(self._parcels[index].sums_ENKR is not None)
        for run in line[_first(line, start) :]:
            if run.begin >= stop:
                return
            parcel = self._parcels[run.parcel]
            low, high = max(run.begin, start), min(run.begin + run.size, stop)
            if parcel.sums_ENKR is not None and low < high:
                flat = _part(parcel, run.tile).reshape(-1)
                row[low - start : high - start] = flat[low - run.begin : high - run.begin]

    def _runs(self, rank: int) -> Iterator[_Run]:
        begin = len(self._parcels)
        for index, parcel in enumerate(self._parcels):
            for tile in parcel.route.kept[rank]:
                size = tile.num_blocks(parcel.block) * parcel.rank
                yield _Run(parcel=index, tile=tile, begin=begin, size=size)
                begin += size

    def _unpack(self, mine: Tensor) -> list[Arrived]:
        found: list[list[Tensor]] = [[] for _ in self._parcels]
        for run in self._lines[self._route.rank]:
            shape = _shape(run.tile, self._parcels[run.parcel])
            found[run.parcel].append(mine[run.begin : run.begin + run.size].view(shape))
        return [
            Arrived(tiles=tuple(tiles), presence=mine[index]) for index, tiles in enumerate(found)
        ]


def _first(line: Sequence[_Run], start: int) -> int:
    """The run that holds number ``start`` of a line, or the first one after it."""
    return max(0, bisect_right(line, start, key=lambda run: run.begin) - 1)


def _shape(tile: Tile, parcel: Parcel) -> tuple[int, int, int, int]:
    first, last = tile.blocks(parcel.block)
    return (*tile.sizes[:2], last - first, parcel.rank)


def _part(parcel: Parcel, tile: Tile) -> Tensor:
    """C of the blocks that a tile touches; zeros where this rank had no gradient."""
    if parcel.sums_ENKR is None or parcel.tile is None:
        return torch.zeros(_shape(tile, parcel), dtype=parcel.dtype, device=parcel.device)
    whole = parcel.tile
    matrices = slice(tile.matrices[0] - whole.matrices[0], tile.matrices[1] - whole.matrices[0])
    rows = slice(tile.rows[0] - whole.rows[0], tile.rows[1] - whole.rows[0])
    origin, (first, last) = whole.blocks(parcel.block)[0], tile.blocks(parcel.block)
    return parcel.sums_ENKR[matrices, rows, first - origin : last - origin]
