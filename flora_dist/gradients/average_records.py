# SPDX-License-Identifier: Apache-2.0
"""Sketches in few bits over the network: an all-to-all of records, summed where they are kept.

A reduce-scatter of records is every rank's records for each owner, summed there in the arithmetic's
dtype, in the order of ranks, and rounded once more as the mean. Ranks that keep the same share
its lines among them: each owns some, and they gather the means. Those are all ranks without a
scatter, and replicas of a shard (HSDP), whose records go to their owner at once, over one group of
all ranks: sums of some of them would have to travel in full, or be rounded twice. All ranks round a
mean by the same random bits, so that every layout of as many ranks has the same one.

Lines are the rows of all matrices of a tile. A bucket has some whole lines for each rank. Shape
suffixes: L lines, K blocks, R rank, O bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.comm.groups import exchange_octets, gather
from flora_dist.core.records import Code, mean_bits
from flora_dist.core.step.gradient import Records
from flora_dist.gradients.accumulator import Accumulator, Share
from flora_dist.gradients.route import Mean, Route

_WORK_NUMBERS = 1 << 19
"""Of a piece: it is read, summed and rounded at once, in some 30 bytes a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lines:
    """Some lines of one share."""

    index: int
    """Of the parameter."""
    place: int
    """Of the share among those of its owner."""
    share: Share
    first: int
    last: int

    def octets(self, code: Code) -> int:
        """Bytes of its records."""
        return (self.last - self.first) * self.share.shape[2] * code.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owners:
    """Ranks of one group, and what each owns: some lines of what its replicas keep, too."""

    group: dist.ProcessGroup
    places: tuple[tuple[int, int], ...]
    """By rank of the group: which of the route's ``kept``, and place among its replicas."""
    replicas: dist.ProcessGroup | None
    """This rank's; None: it keeps what it owns."""

    @property
    def num_replicas(self) -> int:
        """Of everything that is kept."""
        return 1 if self.replicas is None else dist.get_world_size(self.replicas)

    @property
    def me(self) -> int:
        """This rank."""
        return dist.get_rank(self.group)

    @property
    def replicas_of_me(self) -> list[int]:
        """Ranks that keep the same, in the order of ``replicas``."""
        kept = self.places[self.me][0]
        return sorted(
            (rank for rank, place in enumerate(self.places) if place[0] == kept),
            key=lambda rank: self.places[rank][1],
        )


def _owners_of(route: Route) -> _Owners:
    """All ranks of the route must call this."""
    assert len(route.sums) <= 1, route
    replicas = route.sums[0] if route.sums else None
    if route.scatter is None:
        assert replicas is not None, route
        places = tuple((0, rank) for rank in range(dist.get_world_size(replicas)))
        return _Owners(group=replicas, places=places, replicas=replicas)
    if replicas is None:
        places = tuple((rank, 0) for rank in range(dist.get_world_size(route.scatter)))
        return _Owners(group=route.scatter, places=places, replicas=None)
    own = (dist.get_rank(), route.rank, dist.get_rank(replicas))
    everyone = sorted(gather(own, [route.scatter, replicas]))
    group = dist.group.WORLD
    if len(everyone) < dist.get_world_size():
        ranks = [rank for rank, _, _ in everyone]
        group = dist.new_group(ranks, use_local_synchronization=True)
    assert group is not None
    return _Owners(
        group=group,
        places=tuple((kept, replica) for _, kept, replica in everyone),
        replicas=replicas,
    )


class RecordBuckets:
    """Parameters of one group of ranks whose sketches travel in few bits."""

    def __init__(
        self,
        accumulators: Sequence[Accumulator],
        routes: Sequence[Route],
        wire_bits: int,
        bucket_bytes: int,
    ) -> None:
        """All routes go over the same ranks; each of those must call this."""
        self._own, self._divisor = accumulators, routes[0].divisor
        self._owners = _owners_of(routes[0])
        self._ranks, self._me = len(self._owners.places), self._owners.me
        self._wire = [Code(bits=wire_bits, numbers=each.rank) for each in accumulators]
        self._mean = [Code(bits=mean_bits(wire_bits), numbers=each.rank) for each in accumulators]
        self._shares = [
            [each.share_of(tile) for tile in own.kept[own.rank]]
            for each, own in zip(accumulators, routes, strict=True)
        ]
        lines = [list(self._line(routes, rank)) for rank in range(self._ranks)]
        limit = max(1, bucket_bytes // self._ranks)
        cut = [list(_buckets(line, self._wire, limit)) for line in lines]
        self._buckets = [
            [line[number] if number < len(line) else [] for line in cut]
            for number in range(max(1, *map(len, cut)))
        ]
        """By bucket and owner."""
        self._ends = _last_buckets(self._buckets, len(accumulators))

    def _line(self, routes: Sequence[Route], rank: int) -> Iterator[_Lines]:
        """What one rank owns of every parameter."""
        for index, (each, route) in enumerate(zip(self._own, routes, strict=True)):
            kept, replica = self._owners.places[rank]
            for place, tile in enumerate(route.kept[kept]):
                share = each.share_of(tile)
                first, last = (
                    share.num_lines * (replica + more) // self._owners.num_replicas
                    for more in (0, 1)
                )
                if first < last:
                    yield _Lines(index=index, place=place, share=share, first=first, last=last)

    def run(self) -> list[Mean]:
        """One collective per bucket, two where means are gathered."""
        were_here = [each.sums_ENKR is not None for each in self._own]
        steps = [each.next_step for each in self._own]
        present_P = torch.zeros(len(self._own))
        means = [
            [self._empty(share, code) for share in shares]
            for shares, code in zip(self._shares, self._mean, strict=True)
        ]
        for number, owners in enumerate(self._buckets):
            header = torch.tensor(were_here if number == 0 else [], dtype=torch.uint8)
            lines = self._exchange(owners, header.to(self._device))
            self._drop_packed(number)
            if number == 0:
                present_P = torch.stack([line[: len(header)] for line in lines]).sum(0)
            rounded = self._round(owners[self._me], [line[len(header) :] for line in lines], steps)
            for owner, records in self._spread(owners, rounded):
                _put(means, owners[owner], records, self._mean)
        return [
            Mean(tiles=tuple(tiles), was_here=was_here, presence=presence)
            for tiles, was_here, presence in zip(means, were_here, present_P, strict=True)
        ]

    @property
    def _device(self) -> torch.device:
        return self._own[0].device

    def _empty(self, share: Share, code: Code) -> Records:
        octets = torch.zeros((*share.shape[:3], code.bytes), dtype=torch.uint8, device=self._device)
        return Records(octets=octets, code=code, dtype=self._own[0].dtype)

    def _exchange(self, owners: Sequence[Sequence[_Lines]], header_P: Tensor) -> list[Tensor]:
        """Every rank's records for this one, as they travel."""
        packed: list[Tensor] = []
        given = []
        for pieces in owners:
            parts = [header_P]
            for piece in pieces:
                own, code = self._own[piece.index], self._wire[piece.index]
                records = own.wire_records(piece.share, piece.first, piece.last, code)
                parts.append(records.reshape(-1))
            packed += parts
            given.append(sum(len(part) for part in parts))
        mine = given[self._me]
        received = exchange_octets(
            torch.cat(packed), given, [mine] * self._ranks, self._owners.group
        )
        return list(torch.split(received, mine)) if mine else [received] * self._ranks

    def _drop_packed(self, number: int) -> None:
        """Drop sketches of which nothing is left to pack."""
        for each, end in zip(self._own, self._ends, strict=True):
            if end <= number:
                each.drop()

    def _round(
        self, pieces: Sequence[_Lines], lines: Sequence[Tensor], steps: Sequence[int]
    ) -> list[Tensor]:
        """The mean of each piece, as records."""
        rounded, begin = [], 0
        for piece in pieces:
            own, code = self._own[piece.index], self._wire[piece.index]
            shape = (piece.last - piece.first, piece.share.shape[2], code.bytes)
            stop = begin + piece.octets(code)
            records = [line[begin:stop].view(shape) for line in lines]
            step, mean = steps[piece.index], self._mean[piece.index]
            rounded.append(
                own.rounded_mean(records, piece.share, piece.first, step, code, mean, self._divisor)
            )
            begin = stop
        return rounded

    def _spread(
        self, owners: Sequence[Sequence[_Lines]], rounded: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Owners whose means are kept here, with their records in a line."""
        mine = torch.cat([torch.empty(0, dtype=torch.uint8, device=self._device)])
        if rounded:
            mine = torch.cat([records.reshape(-1) for records in rounded])
        replicas, ranks = self._owners.replicas, self._owners.replicas_of_me
        if replicas is None:
            yield self._me, mine
            return
        taken = [sum(p.octets(self._mean[p.index]) for p in owners[rank]) for rank in ranks]
        given = [len(mine)] * len(ranks)
        received = exchange_octets(mine.repeat(len(ranks)), given, taken, replicas)
        yield from zip(ranks, torch.split(received, taken), strict=True)


def _put(
    means: Sequence[Sequence[Records]],
    pieces: Sequence[_Lines],
    line: Tensor,
    codes: Sequence[Code],
) -> None:
    begin = 0
    for piece in pieces:
        code = codes[piece.index]
        stop = begin + piece.octets(code)
        shape = (piece.last - piece.first, piece.share.shape[2], code.bytes)
        target = means[piece.index][piece.place].octets.flatten(0, 1)
        target[piece.first : piece.last] = line[begin:stop].view(shape)
        begin = stop


def _buckets(line: Sequence[_Lines], codes: Sequence[Code], limit: int) -> Iterator[list[_Lines]]:
    """A rank's line in buckets of at most so many bytes, or one line of a matrix; in pieces."""
    bucket: list[_Lines] = []
    room = limit
    for whole in line:
        first = whole.first
        of_one = whole.share.shape[2] * codes[whole.index].bytes
        numbers = whole.share.shape[2] * codes[whole.index].numbers
        while first < whole.last:
            if bucket and room < of_one:
                yield bucket
                bucket, room = [], limit
            together = min(room // of_one, _WORK_NUMBERS // numbers)
            last = min(whole.last, first + max(1, together))
            bucket.append(
                _Lines(
                    index=whole.index,
                    place=whole.place,
                    share=whole.share,
                    first=first,
                    last=last,
                )
            )
            room -= (last - first) * of_one
            first = last
    if bucket:
        yield bucket


def _last_buckets(buckets: Sequence[Sequence[Sequence[_Lines]]], count: int) -> list[int]:
    """The bucket after which nothing of a parameter is left to pack, for each."""
    ends = [0] * count
    for number, owners in enumerate(buckets):
        for pieces in owners:
            for piece in pieces:
                ends[piece.index] = number
    return ends
