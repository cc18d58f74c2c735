# SPDX-License-Identifier: Apache-2.0
"""Sketches of gradients over the network: one reduce-scatter or all-reduce per group, in buckets.

Every rank has sketches of full gradients; each keeps the mean of those its own tiles touch. For
each rank of a group there is a line of numbers: presence of each parameter, then what it keeps of
each, in the order of the parcels. A bucket is the same stretch of every line; lines are padded to
the longest. A parcel's own sketches are dropped as soon as they are packed, so that what arrives
takes their place in memory. Shape suffixes: E matrices, N rows, K blocks, R rank of the sketch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.comm.groups import all_reduce_, group_device, reduce_scatter
from flora_dist.core.tiles import Tile
from flora_dist.gradients.accumulator import Accumulator

BUCKET_BYTES = 1 << 25
"""Largest buffer of one collective, all lines together: 32 MiB, as DDP's 25 MiB buckets."""
SMALLEST_BUCKET_BYTES = 1 << 20
BUCKETS = 8
"""Buffers are an eighth of what is sent, or smaller, down to 1 MiB: little beside the sketches."""


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

    @property
    def weight_of_mean(self) -> float:
        """What ranks multiply by whose parts of a mean gradient are to be found in the mean."""
        return self.divisor / math.prod(dist.get_world_size(group) for group in self.sums)

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
    accumulator: Accumulator
    """Empty: this rank had no gradient, and counts as zero."""
    device: torch.device
    """Where its C is, or would be."""

    def size(self, tile: Tile) -> int:
        """Numbers of C for a tile."""
        return tile.num_blocks(self.accumulator.block) * self.accumulator.rank

    def shape(self, tile: Tile) -> tuple[int, int, int, int]:
        """(E, N, K, R) of C for a tile."""
        first, last = tile.blocks(self.accumulator.block)
        return (*tile.sizes[:2], last - first, self.accumulator.rank)

    def part(self, tile: Tile) -> Tensor:
        """C of the blocks that a tile touches; zeros where this rank had no gradient."""
        sums_ENKR, whole = self.accumulator.sums_ENKR, self.accumulator.tile
        if sums_ENKR is None or whole is None:
            return torch.zeros(self.shape(tile), dtype=self.accumulator.dtype, device=self.device)
        matrices = slice(tile.matrices[0] - whole.matrices[0], tile.matrices[1] - whole.matrices[0])
        rows = slice(tile.rows[0] - whole.rows[0], tile.rows[1] - whole.rows[0])
        block = self.accumulator.block
        origin, (first, last) = whole.blocks(block)[0], tile.blocks(block)
        return sums_ENKR[matrices, rows, first - origin : last - origin]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """What this rank keeps of one parameter."""

    tiles: tuple[Tensor, ...]
    """Mean C (E, N, K, R) of each tile kept."""
    was_here: bool
    """Whether this rank had a gradient."""
    presence: Tensor | None
    """Above 0 if any rank had one, (); None: this rank alone decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Some numbers of a line: one tile of one parcel."""

    parcel: int
    tile: Tile
    begin: int
    size: int

    @property
    def stop(self) -> int:
        return self.begin + self.size


def carry(
    parcels: Sequence[Parcel], *, wire_dtype: torch.dtype | None, bucket_bytes: int = BUCKET_BYTES
) -> list[Arrived]:
    """Average sketches over the ranks of their routes; the accumulators are empty afterwards.

    Args:
        parcels: in an order that is equal on all ranks, with equal routes but for ``rank``.
        wire_dtype: what travels; None: the dtype of C.
        bucket_bytes: largest buffer of a collective.
    """
    together: dict[tuple[object, ...], list[int]] = {}
    for index, parcel in enumerate(parcels):
        route, dtype = parcel.route, parcel.accumulator.dtype
        key = (route.scatter, route.sums, route.divisor, dtype, parcel.device)
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
    """No other rank takes part: what is here is kept."""
    was_here = parcel.accumulator.sums_ENKR is not None
    kept = parcel.route.kept[0] if was_here else ()
    tiles = tuple(parcel.part(tile).contiguous() for tile in kept)
    parcel.accumulator.drop()
    return Arrived(tiles=tiles, was_here=was_here, presence=None)


class _Shipment:
    """Parcels of one group of ranks."""

    def __init__(
        self, parcels: Sequence[Parcel], wire_dtype: torch.dtype | None, bucket_bytes: int
    ) -> None:
        first = parcels[0]
        self._parcels, self._route, self._device = parcels, first.route, first.device
        self._dtype = first.accumulator.dtype
        self._wire = wire_dtype or self._dtype
        self._were_here = [parcel.accumulator.sums_ENKR is not None for parcel in parcels]
        self._lines = [list(self._runs(rank)) for rank in range(len(first.route.kept))]
        header = len(parcels)
        self._length = max((line[-1].stop for line in self._lines if line), default=header)
        self._width = self._bucket_width(bucket_bytes)
        self._left = list(reversed(range(len(parcels))))
        """Parcels that are not packed yet, the next one last."""
        self._packed_at = self._last_numbers()
        self._presence_P = torch.empty(header, dtype=self._dtype, device=self._device)
        self._mine: dict[int, Tensor] = {}
        """What has arrived of this rank's line, by run."""

    def send(self) -> list[Arrived]:
        """One collective per bucket and group; returns this rank's share of each parcel."""
        for start in range(0, self._length, self._width):
            stop = min(start + self._width, self._length)
            received = self._exchange(self._pack(start, stop))
            self._unpack(received.to(self._device), start)
        return self._arrived()

    def _bucket_width(self, bucket_bytes: int) -> int:
        """Numbers of each line in a bucket."""
        number_bytes = self._wire.itemsize * len(self._lines)
        smallest, share = SMALLEST_BUCKET_BYTES // number_bytes, -(-self._length // BUCKETS)
        return max(1, min(bucket_bytes // number_bytes, max(smallest, share)))

    def _runs(self, rank: int) -> Iterator[_Run]:
        begin = len(self._parcels)
        for index, parcel in enumerate(self._parcels):
            for tile in parcel.route.kept[rank]:
                yield _Run(parcel=index, tile=tile, begin=begin, size=parcel.size(tile))
                begin += parcel.size(tile)

    def _last_numbers(self) -> list[int]:
        """Where in the lines each parcel ends."""
        ends = [0] * len(self._parcels)
        for line in self._lines:
            for run in line:
                ends[run.parcel] = max(ends[run.parcel], run.stop)
        return ends

    # ---- a bucket

    def _pack(self, start: int, stop: int) -> Tensor:
        bucket = torch.zeros(len(self._lines), stop - start, dtype=self._wire, device=self._device)
        for row, line in zip(bucket, self._lines, strict=True):
            for index in range(start, min(len(self._parcels), stop)):
                row[index - start] = float(self._were_here[index])
            for run, low, high in _overlaps(line, start, stop):
                if self._were_here[run.parcel]:
                    flat = self._parcels[run.parcel].part(run.tile).reshape(-1)
                    row[low - start : high - start] = flat[low - run.begin : high - run.begin]
        while self._left and self._packed_at[self._left[-1]] <= stop:
            self._parcels[self._left.pop()].accumulator.drop()
        return bucket

    def _exchange(self, bucket: Tensor) -> Tensor:
        group = self._route.scatter or self._route.sums[0]
        there = bucket.to(group_device(bucket, group))
        received = there.view(-1)
        if self._route.scatter is not None:
            received = reduce_scatter(there, self._route.scatter)
        for replicas in self._route.sums:
            all_reduce_(received, replicas)
        return received

    def _unpack(self, received: Tensor, start: int) -> None:
        stop = start + len(received)
        header = min(len(self._parcels), stop)
        if start < header:
            self._presence_P[start:header] = received[: header - start]
        line = self._lines[self._route.rank]
        for run, low, high in _overlaps(line, start, stop):
            flat = self._mine.get(run.begin)
            if flat is None:
                flat = torch.empty(run.size, dtype=self._dtype, device=self._device)
                self._mine[run.begin] = flat
            numbers = received[low - start : high - start].to(self._dtype)
            flat[low - run.begin : high - run.begin] = numbers / self._route.divisor

    def _arrived(self) -> list[Arrived]:
        found: list[list[Tensor]] = [[] for _ in self._parcels]
        for run in self._lines[self._route.rank]:
            shape = self._parcels[run.parcel].shape(run.tile)
            found[run.parcel].append(self._mine[run.begin].view(shape))
        return [
            Arrived(tiles=tuple(tiles), was_here=was_here, presence=presence)
            for tiles, was_here, presence in zip(
                found, self._were_here, self._presence_P, strict=True
            )
        ]


def _overlaps(line: Sequence[_Run], start: int, stop: int) -> Iterator[tuple[_Run, int, int]]:
    """The runs that numbers [start, stop) of a line are of, and which numbers of them."""
    first = bisect_right(line, start, key=lambda run: run.begin) - 1
    for run in line[max(0, first) :]:
        if run.begin >= stop:
            return
        low, high = max(run.begin, start), min(run.stop, stop)
        if low < high:
            yield run, low, high
