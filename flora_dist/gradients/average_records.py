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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora_dist.core.comm.groups import Pending, begin_exchange
from flora_dist.core.records import Code, mean_bits
from flora_dist.core.step.gradient import Records
from flora_dist.gradients.accumulator import Accumulator
from flora_dist.gradients.owners import Owners
from flora_dist.gradients.record_pieces import Piece, cut_in_buckets, last_buckets
from flora_dist.gradients.route import Mean, Route


@dataclass(slots=True, kw_only=True)
class _UnderWay:
    """One mean of all parameters, from the first message to the last."""

    were_here: list[bool]
    """Whether this rank has a gradient of each parameter."""
    steps: list[int]
    """That the sketches are of."""
    is_kept: bool = True
    """False: its gradients have been dropped here, and others get zeros."""
    flags_WP: Tensor | None = None
    """Of every rank: whether it has kept its gradients, and has one of each parameter."""
    sketches: dict[int, Pending] = field(default_factory=dict)
    """By bucket: records on their way to their owners."""
    means: dict[int, Pending | Tensor] = field(default_factory=dict)
    """By bucket: means on their way to replicas, or where they stay."""


class RecordBuckets:
    """Parameters of one group of ranks whose sketches travel in few bits."""

    def __init__(
        self,
        accumulators: Sequence[Accumulator],
        routes: Sequence[Route],
        wire_bits: int,
        bucket_bytes: int,
        owners: Owners,
    ) -> None:
        """All routes go over the same ranks; each of those must call this."""
        self._own, self._divisor, self._owners = accumulators, routes[0].divisor, owners
        self._ranks, self._me = len(self._owners.places), self._owners.me
        self._wire = [Code(bits=wire_bits, numbers=each.rank) for each in accumulators]
        self._mean = [Code(bits=mean_bits(wire_bits), numbers=each.rank) for each in accumulators]
        self._shares = [
            [each.share_of(tile) for tile in own.kept[own.rank]]
            for each, own in zip(accumulators, routes, strict=True)
        ]
        lines = [list(self._line(routes, rank)) for rank in range(self._ranks)]
        limit = max(1, bucket_bytes // self._ranks)
        cut = [list(cut_in_buckets(line, self._wire, limit)) for line in lines]
        self._buckets = [
            [line[number] if number < len(line) else [] for line in cut]
            for number in range(max(1, *map(len, cut)))
        ]
        """By bucket and owner."""
        self._ends = last_buckets(self._buckets, len(accumulators))
        self._under_way: _UnderWay | None = None

    def _line(self, routes: Sequence[Route], rank: int) -> Iterator[Piece]:
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
                    yield Piece(index=index, place=place, share=share, first=first, last=last)

    def send(self) -> None:
        """Begin to send all sketches to their owners; the accumulators are empty afterwards."""
        for number in range(len(self._buckets)):
            self._sketches(number)

    def send_means(self) -> None:
        """Await the sketches that are owned here, and begin to send their means to replicas."""
        for number in range(len(self._buckets)):
            self._means(number)

    def run(self) -> list[Mean]:
        """One collective per bucket, two where means are gathered; less what is under way."""
        means: dict[tuple[int, int], Records] = {}
        for number, owners in enumerate(self._buckets):
            for owner, records in self._arriving(number):
                self._put(means, owners[owner], records)
        done, self._under_way = self._begun(), None
        assert done.flags_WP is not None
        presence_P = done.flags_WP[:, 1:].sum(0)
        return [
            Mean(
                tiles=tuple(self._mean_of(means, index, place) for place in range(len(shares))),
                was_here=was_here,
                presence=presence,
            )
            for index, (shares, was_here, presence) in enumerate(
                zip(self._shares, done.were_here, presence_P, strict=True)
            )
        ]

    def check_basis(self) -> None:
        """Refuse what has been sent and the coming step cannot read.

        Raises:
            RuntimeError: the optimizer has loaded another step since.
        """
        if self._under_way is not None:
            for each, step in zip(self._own, self._under_way.steps, strict=True):
                each.check_step(step)

    def drop(self) -> None:
        """Send zeros from here on, which tell the others that this rank has no gradients to keep.

        The accumulators must be empty, but for what has been sent.
        """
        self._begun().is_kept = False

    def who_dropped(self) -> list[int]:
        """Ranks of the group that have; after ``send_means`` and before ``run``."""
        flags_WP = self._begun().flags_WP
        assert flags_WP is not None
        return [rank for rank, is_kept in enumerate(flags_WP[:, 0].tolist()) if not is_kept]

    @property
    def _device(self) -> torch.device:
        return self._own[0].device

    def _begun(self) -> _UnderWay:
        if self._under_way is None:
            self._under_way = _UnderWay(
                were_here=[each.sums_ENKR is not None for each in self._own],
                steps=[each.next_step for each in self._own],
            )
        return self._under_way

    def _mean_of(self, means: dict[tuple[int, int], Records], index: int, place: int) -> Records:
        """A share's mean, made when the first of it comes: sketches have gone by then."""
        if (index, place) not in means:
            shape, code = self._shares[index][place].shape[:3], self._mean[index]
            octets = torch.zeros((*shape, code.bytes), dtype=torch.uint8, device=self._device)
            means[index, place] = Records(octets=octets, code=code, dtype=self._own[0].dtype)
        return means[index, place]

    def _put(
        self, means: dict[tuple[int, int], Records], pieces: Sequence[Piece], line: Tensor
    ) -> None:
        begin = 0
        for piece in pieces:
            mean = self._mean_of(means, piece.index, piece.place)
            stop = begin + piece.octets(mean.code)
            shape = (piece.last - piece.first, piece.share.shape[2], mean.code.bytes)
            mean.octets.flatten(0, 1)[piece.first : piece.last] = line[begin:stop].view(shape)
            begin = stop

    def _sketches(self, number: int) -> Pending:
        """A bucket of sketches on its way: every rank's records for this one, as they travel."""
        begun = self._begun()
        if number not in begun.sketches:
            begun.sketches[number] = self._exchange(
                self._buckets[number], self._header(number, begun)
            )
            self._drop_packed(number)
        return begun.sketches[number]

    def _header(self, number: int, begun: _UnderWay) -> Tensor:
        """What comes before the records for each rank, once: ``flags_WP`` of this one."""
        flags = [begun.is_kept, *begun.were_here] if number == 0 else []
        return torch.tensor(flags, dtype=torch.uint8).to(self._device)

    def _exchange(self, owners: Sequence[Sequence[Piece]], header_P: Tensor) -> Pending:
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
        taken = [given[self._me]] * self._ranks
        return begin_exchange(torch.cat(packed), given, taken, self._owners.group)

    def _drop_packed(self, number: int) -> None:
        """Drop sketches of which nothing is left to pack."""
        for each, end in zip(self._own, self._ends, strict=True):
            if end <= number:
                each.drop()

    def _means(self, number: int) -> Pending | Tensor:
        """A bucket of means on its way to replicas; as bytes where it stays."""
        begun = self._begun()
        if number in begun.means:
            return begun.means[number]
        received = self._sketches(number).wait()
        lines = received.view(self._ranks, len(received) // self._ranks)
        del begun.sketches[number]
        num_flags = len(self._header(number, begun))
        if number == 0:
            begun.flags_WP = lines[:, :num_flags]
        rounded = self._round(
            self._buckets[number][self._me], list(lines[:, num_flags:]), begun.steps
        )
        begun.means[number] = self._spread(self._buckets[number], rounded)
        return begun.means[number]

    def _round(
        self, pieces: Sequence[Piece], lines: Sequence[Tensor], steps: Sequence[int]
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
        self, owners: Sequence[Sequence[Piece]], rounded: Sequence[Tensor]
    ) -> Pending | Tensor:
        """Send this rank's means to those that keep the same."""
        mine = torch.cat([torch.empty(0, dtype=torch.uint8, device=self._device)])
        if rounded:
            mine = torch.cat([records.reshape(-1) for records in rounded])
        replicas, ranks = self._owners.replicas, self._owners.replicas_of_me
        if replicas is None:
            return mine
        given = [len(mine)] * len(ranks)
        return begin_exchange(mine.repeat(len(ranks)), given, self._taken(owners), replicas)

    def _taken(self, owners: Sequence[Sequence[Piece]]) -> list[int]:
        """Bytes of the means of each replica."""
        return [
            sum(piece.octets(self._mean[piece.index]) for piece in owners[rank])
            for rank in self._owners.replicas_of_me
        ]

    def _arriving(self, number: int) -> Iterator[tuple[int, Tensor]]:
        """Owners whose means are kept here, with their records in a line."""
        means = self._means(number)
        del self._begun().means[number]
        if isinstance(means, Tensor):
            yield self._me, means
            return
        taken = self._taken(self._buckets[number])
        yield from zip(self._owners.replicas_of_me, torch.split(means.wait(), taken), strict=True)
