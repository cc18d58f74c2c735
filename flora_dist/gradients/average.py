# SPDX-License-Identifier: Apache-2.0
"""Sketches of gradients over the network: one reduce-scatter or all-reduce per group, in buckets.

Every rank has sketches of full gradients; each keeps the mean of those its own tiles touch. For
each rank of a group there is a line of numbers: presence of each parameter, then what it keeps of
each. A bucket is the same stretch of every line; lines are padded to the longest. A parameter's own
sketches are dropped as soon as they are packed, so that what arrives takes their place in memory.
Shape suffixes: E matrices, N rows, K blocks, R rank of the sketch; L lines, S numbers of a bucket.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flora_dist.core.comm.groups import all_reduce_, group_apart, group_device, reduce_scatter
from flora_dist.core.records import Code
from flora_dist.gradients.accumulator import Accumulator
from flora_dist.gradients.average_lines import lines_of, overlaps
from flora_dist.gradients.average_records import RecordBuckets
from flora_dist.gradients.owners import owners_of
from flora_dist.gradients.pipeline import Pipeline, cut_by_bytes
from flora_dist.gradients.route import Mean, Route

BUCKET_BYTES = 1 << 25
"""Largest buffer of one collective, all lines together: 32 MiB, as DDP's 25 MiB buckets."""
SMALLEST_BUCKET_BYTES = 1 << 20
BUCKETS = 8
"""Buffers are an eighth of what is sent, or smaller, down to 1 MiB: little beside the sketches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What of sketches in few bits is sent during backward."""

    order: Sequence[int]
    """Of the parameters, as their gradients are expected; equal on all ranks."""
    bucket_bytes: int
    """Of what a rank sends at once."""


class Averaging:
    """Averages sketches over the ranks of their routes, as planned once."""

    def __init__(
        self,
        accumulators: Sequence[Accumulator],
        routes: Sequence[Route],
        *,
        wire_dtype: torch.dtype | None,
        wire_bits: int | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        ahead: Ahead | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            accumulators: in an order that is equal on all ranks.
            routes: of each, equal on all ranks but for ``rank``.
            wire_dtype: what travels; None: the dtype of C.
            wire_bits: bits of each number that travels, in records; None: as ``wire_dtype`` says.
            bucket_bytes: largest buffer of a collective.
            ahead: what is sent before ``run``; None: nothing.
        """
        together: dict[Hashable, list[int]] = {}
        for index, (own, route) in enumerate(zip(accumulators, routes, strict=True)):
            key = (route.scatter, route.sums, route.divisor, own.dtype, own.device)
            together.setdefault(key, []).append(index)
        self._groups: list[tuple[list[int], _Alone | _Buckets | RecordBuckets]] = []
        self._pipelines: list[Pipeline] = []
        for indices in together.values():
            if ahead is not None and wire_bits is not None:
                cut = _cut(indices, accumulators, routes, wire_bits, ahead)
                if len(cut) > 1:
                    self._pipelines.append(
                        _pipeline(cut, accumulators, routes, wire_bits, bucket_bytes)
                    )
                    continue
            group = _group(
                [accumulators[index] for index in indices],
                [routes[index] for index in indices],
                wire_dtype,
                wire_bits,
                bucket_bytes,
            )
            self._groups.append((indices, group))

    @property
    def sends_ahead(self) -> bool:
        """Whether anything is sent before ``run``."""
        return bool(self._pipelines)

    def arrived(self, index: int) -> None:
        """A parameter's last gradient is in: what is complete now may be sent ahead."""
        for pipeline in self._pipelines:
            pipeline.arrived(index)

    def has_sent(self, index: int) -> bool:
        """Whether a parameter's sketches have been sent ahead."""
        return any(pipeline.has_sent(index) for pipeline in self._pipelines)

    @property
    def is_under_way(self) -> bool:
        """Whether anything has been sent ahead."""
        return any(pipeline.is_under_way for pipeline in self._pipelines)

    def drop(self) -> None:
        """Forget what has been sent ahead; the accumulators must be empty.

        All ranks of a parameter's route that have sent something must call this.
        """
        for pipeline in self._pipelines:
            pipeline.drop()

    def run(self) -> list[Mean]:
        """This rank's share of each mean; the accumulators are empty afterwards.

        Raises:
            RuntimeError: a rank has dropped gradients of which it had sent some ahead.
        """
        means: dict[int, Mean] = {}
        for pipeline in self._pipelines:
            means.update(pipeline.run())
        for indices, group in self._groups:
            means.update(zip(indices, group.run(), strict=True))
        return [means[index] for index in range(len(means))]


def _cut(
    indices: Sequence[int],
    accumulators: Sequence[Accumulator],
    routes: Sequence[Route],
    wire_bits: int,
    ahead: Ahead,
) -> list[list[int]]:
    """The parameters of one route in buckets; every rank finds the same."""
    if not routes[indices[0]].travels:
        return []
    mine = set(indices)
    sizes = [
        (index, _sent_bytes(accumulators[index], routes[index], bits=wire_bits))
        for index in ahead.order
        if index in mine
    ]
    return cut_by_bytes(sizes, ahead.bucket_bytes)


def _sent_bytes(own: Accumulator, route: Route, *, bits: int) -> int:
    """Of a parameter's records to all who keep some."""
    blocks = sum(tile.num_blocks(own.block) for tiles in route.kept for tile in tiles)
    return blocks * Code(bits=bits, numbers=own.rank).bytes


def _pipeline(
    cut: Sequence[Sequence[int]],
    accumulators: Sequence[Accumulator],
    routes: Sequence[Route],
    wire_bits: int,
    bucket_bytes: int,
) -> Pipeline:
    known = owners_of(routes[cut[0][0]])
    # The framework's messages may come between in another order on every rank.
    owners = replace(known, group=group_apart(known.group))
    return Pipeline(
        [
            (
                bucket,
                RecordBuckets(
                    [accumulators[index] for index in bucket],
                    [routes[index] for index in bucket],
                    wire_bits,
                    bucket_bytes,
                    owners,
                ),
            )
            for bucket in cut
        ]
    )


def are_anywhere(means: Sequence[Mean]) -> list[bool]:
    """Whether any rank has a gradient; asks the device only where this rank has none."""
    present = [mean.was_here for mean in means]
    asked = {
        index: mean.presence
        for index, mean in enumerate(means)
        if not mean.was_here and mean.presence is not None
    }
    if asked:
        counts = torch.stack([flag.double().cpu() for flag in asked.values()])
        for index, count in zip(asked, counts.tolist(), strict=True):
            present[index] = count > 0
    return present


def _group(
    accumulators: Sequence[Accumulator],
    routes: Sequence[Route],
    wire_dtype: torch.dtype | None,
    wire_bits: int | None,
    bucket_bytes: int,
) -> _Alone | _Buckets | RecordBuckets:
    if not routes[0].travels:
        return _Alone(accumulators, routes)
    if wire_bits is not None:
        owners = owners_of(routes[0])
        sent = sum(map(partial(_sent_bytes, bits=wire_bits), accumulators, routes))
        few = min(bucket_bytes, max(SMALLEST_BUCKET_BYTES, -(-sent // BUCKETS)))
        return RecordBuckets(accumulators, routes, wire_bits, few, owners)
    return _Buckets(accumulators, routes, wire_dtype or accumulators[0].dtype, bucket_bytes)


class _Alone:
    """Parameters of whose sketches no other rank has any: what is here is kept."""

    def __init__(self, accumulators: Sequence[Accumulator], routes: Sequence[Route]) -> None:
        self._own = [
            (each, [each.share_of(tile) for tile in route.kept[0]])
            for each, route in zip(accumulators, routes, strict=True)
        ]

    def run(self) -> Iterator[Mean]:
        for each, shares in self._own:
            was_here = each.sums_ENKR is not None
            tiles = tuple(each.sketches(share) for share in shares) if was_here else ()
            each.drop()
            yield Mean(tiles=tiles, was_here=was_here, presence=None)


class _Buckets:
    """Parameters of one group of ranks."""

    def __init__(
        self,
        accumulators: Sequence[Accumulator],
        routes: Sequence[Route],
        wire: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        first = accumulators[0]
        self._accumulators, self._route, self._wire = accumulators, routes[0], wire
        self._dtype, self._device = first.dtype, first.device
        self._lines, self._header = lines_of(accumulators, routes), len(accumulators)
        self._length = self._lines.length
        self._width = self._bucket_width(bucket_bytes)

    def _bucket_width(self, bucket_bytes: int) -> int:
        """Numbers of each line in a bucket."""
        number_bytes = self._wire.itemsize * self._lines.count
        smallest, share = SMALLEST_BUCKET_BYTES // number_bytes, -(-self._length // BUCKETS)
        return max(1, min(bucket_bytes // number_bytes, max(smallest, share)))

    def run(self) -> list[Mean]:
        """One collective per bucket and group of ranks."""
        were_here = [each.sums_ENKR is not None for each in self._accumulators]
        presence_P = torch.tensor(were_here, dtype=self._wire, device=self._device)
        present_P = torch.empty(self._header, dtype=self._dtype, device=self._device)
        kept: dict[int, Tensor] = {}
        for start in range(0, self._length, self._width):
            stop = min(start + self._width, self._length)
            received_S = self._exchange(self._pack(start, stop, presence_P)).to(self._device)
            present_P[start:stop] = received_S[: max(0, self._header - start)]
            self._unpack(received_S, start, kept)
        tiles: list[list[Tensor]] = [[] for _ in self._accumulators]
        for run in self._lines.mine:
            tiles[run.index].append(kept[run.begin].view(run.share.shape))
        return [
            Mean(tiles=tuple(own), was_here=was_here, presence=presence)
            for own, was_here, presence in zip(tiles, were_here, present_P, strict=True)
        ]

    def _pack(self, start: int, stop: int, presence_P: Tensor) -> Tensor:
        shape = (self._lines.count, stop - start)
        bucket_LS = torch.zeros(shape, dtype=self._wire, device=self._device)
        header = max(0, min(self._header, stop) - start)
        bucket_LS[:, :header] = presence_P[start : start + header]
        self._lines.pack_(bucket_LS, start)
        self._drop_packed(stop)
        return bucket_LS

    def _drop_packed(self, stop: int) -> None:
        """Drop sketches of which nothing is left to pack."""
        for each, end in zip(self._accumulators, self._lines.ends, strict=True):
            if end <= stop:
                each.drop()

    def _exchange(self, bucket_LS: Tensor) -> Tensor:
        group = self._route.scatter or self._route.sums[0]
        there = bucket_LS.to(group_device(bucket_LS, group))
        received = there.view(-1)
        if self._route.scatter is not None:
            received = reduce_scatter(there, self._route.scatter)
        for replicas in self._route.sums:
            all_reduce_(received, replicas)
        return received

    def _unpack(self, received_S: Tensor, start: int, kept: dict[int, Tensor]) -> None:
        for run, low, high in overlaps(self._lines.mine, start, start + len(received_S)):
            if run.begin not in kept:
                kept[run.begin] = received_S.new_empty(run.share.size, dtype=self._dtype)
            numbers = received_S[low - start : high - start].to(self._dtype)
            kept[run.begin][low - run.begin : high - run.begin] = numbers / self._route.divisor
