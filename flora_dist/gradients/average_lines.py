# SPDX-License-Identifier: Apache-2.0
"""Where the sketches of each rank stand among what is sent, and how they get there.

For each rank of a group there is a line of numbers: presence of each parameter, then what it keeps
of each. Shape suffixes: L lines, S numbers of a bucket, P parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from flora_dist.core.tiles import Tile
from flora_dist.gradients.accumulator import Accumulator, Share
from flora_dist.gradients.route import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A stretch of a line: what one rank keeps for one tile."""

    index: int
    """Of the parameter."""
    share: Share
    begin: int

    @property
    def stop(self) -> int:
        """The number after its last one."""
        return self.begin + self.share.size


class Lines(Protocol):
    """The lines of all ranks of a group."""

    @property
    def count(self) -> int:
        """How many."""

    @property
    def length(self) -> int:
        """Numbers of the longest; the others are padded."""

    @property
    def mine(self) -> Sequence[Run]:
        """This rank's, ascending."""

    @property
    def ends(self) -> Sequence[int]:
        """Where in the lines each parameter ends."""

    def pack_(self, bucket_LS: Tensor, start: int) -> None:
        """Write what stands from ``start`` on into zeros, the presence of parameters aside."""


def lines_of(accumulators: Sequence[Accumulator], routes: Sequence[Route]) -> Lines:
    """The lines of parameters that take the same route; every rank finds the same."""
    if all(map(_is_cut_evenly, accumulators, routes)):
        return EvenLines(accumulators, routes)
    return OwnLines(accumulators, routes)


class OwnLines:
    """Ranks that keep whatever they do: each line is found and packed by itself."""

    def __init__(self, accumulators: Sequence[Accumulator], routes: Sequence[Route]) -> None:
        self._accumulators = accumulators
        self._lines = [
            list(_line(accumulators, [route.kept[rank] for route in routes]))
            for rank in range(len(routes[0].kept))
        ]
        self.count, self.mine = len(self._lines), self._lines[routes[0].rank]
        header = len(accumulators)
        self.length = max((line[-1].stop for line in self._lines if line), default=header)
        self.ends = [0] * header
        for line in self._lines:
            for run in line:
                self.ends[run.index] = max(self.ends[run.index], run.stop)

    def pack_(self, bucket_LS: Tensor, start: int) -> None:
        """Line by line."""
        stop = start + bucket_LS.shape[1]
        for row_S, line in zip(bucket_LS, self._lines, strict=True):
            for run, low, high in overlaps(line, start, stop):
                own = self._accumulators[run.index]
                if own.sums_ENKR is not None:
                    flat = own.at(run.share).reshape(-1)
                    row_S[low - start : high - start] = flat[low - run.begin : high - run.begin]


class EvenLines:
    """Ranks that keep one piece after the other of every parameter, all of one size but the last.

    A parameter stands at the same place in all lines, and is packed at once: a copy for each line
    would be a thousand for each parameter of a thousand ranks.
    """

    def __init__(self, accumulators: Sequence[Accumulator], routes: Sequence[Route]) -> None:
        self._accumulators = accumulators
        header, rank = len(accumulators), routes[0].rank
        self._widths = [
            own.share_of(route.kept[0][0]).size
            for own, route in zip(accumulators, routes, strict=True)
        ]
        self.ends = list(accumulate(self._widths, initial=header))[1:]
        self.count, self.length = len(routes[0].kept), self.ends[-1]
        self.mine = [
            Run(index=index, share=own.share_of(route.kept[rank][0]), begin=end - width)
            for index, (own, route, end, width) in enumerate(
                zip(accumulators, routes, self.ends, self._widths, strict=True)
            )
            if route.kept[rank]
        ]

    def pack_(self, bucket_LS: Tensor, start: int) -> None:
        """Parameter by parameter."""
        stop = start + bucket_LS.shape[1]
        for own, end, width in zip(self._accumulators, self.ends, self._widths, strict=True):
            begin = end - width
            low, high = max(begin, start), min(end, stop)
            if low >= high or own.sums_ENKR is None:
                continue
            flat = own.sums_ENKR.reshape(-1)
            columns = slice(low - start, high - start)
            full, rest = divmod(len(flat), width)
            whole_LS = flat[: full * width].view(full, width)
            bucket_LS[:full, columns] = whole_LS[:, low - begin : high - begin]
            last = flat[full * width :][low - begin : min(high - begin, rest)]
            if len(last):
                bucket_LS[full, columns.start : columns.start + len(last)] = last


def overlaps(line: Sequence[Run], start: int, stop: int) -> Iterator[tuple[Run, int, int]]:
    """The runs that numbers [start, stop) of a line are of, and which numbers of them."""
    first = bisect_right(line, start, key=lambda run: run.begin) - 1
    for run in line[max(0, first) :]:
        if run.begin >= stop:
            return
        low, high = max(run.begin, start), min(run.stop, stop)
        if low < high:
            yield run, low, high


def _line(accumulators: Sequence[Accumulator], kept: Sequence[Sequence[Tile]]) -> Iterator[Run]:
    """What one rank keeps, after the presence of each parameter."""
    begin = len(accumulators)
    for index, (own, tiles) in enumerate(zip(accumulators, kept, strict=True)):
        for tile in tiles:
            run = Run(index=index, share=own.share_of(tile), begin=begin)
            begin = run.stop
            yield run


def _is_cut_evenly(own: Accumulator, route: Route) -> bool:
    """Whether ranks keep one piece of C after the other, all as large as the first but the last."""
    if route.scatter is None or own.tile is None or not route.kept[0]:
        return False
    matrices, rows, blocks, numbers = own.sums_shape
    total = matrices * rows * blocks * numbers
    width = own.share_of(route.kept[0][0]).size
    for rank, tiles in enumerate(route.kept):
        begin = min(total, rank * width)
        size = min(total - begin, width)
        if size == 0 and not tiles:
            continue
        if len(tiles) != 1 or _interval(own, tiles[0]) != (begin, size):
            return False
    return True


def _interval(own: Accumulator, tile: Tile) -> tuple[int, int] | None:
    """Where a tile's share begins in C, read in a line, and its size; None: it has gaps."""
    share = own.share_of(tile)
    if share.where is None:
        return None
    matrices, rows, blocks = share.where
    _, all_rows, all_blocks, numbers = own.sums_shape
    is_gapless = matrices.stop - matrices.start == 1 or rows == slice(0, all_rows)
    if blocks != slice(0, all_blocks) or not is_gapless:
        return None
    return (matrices.start * all_rows + rows.start) * all_blocks * numbers, share.size
