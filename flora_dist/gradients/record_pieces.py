# SPDX-License-Identifier: Apache-2.0
"""What each rank owns of sketches in few bits, cut in buckets and in pieces that are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flora_dist.core.records import Code
from flora_dist.gradients.accumulator import Share

_WORK_NUMBERS = 1 << 19
"""Of a piece: it is read, summed and rounded at once, in some 30 bytes a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
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


def cut_in_buckets(
    line: Sequence[Piece], codes: Sequence[Code], limit: int
) -> Iterator[list[Piece]]:
    """A rank's line in buckets of at most so many bytes, or one line of a matrix; in pieces."""
    bucket: list[Piece] = []
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
                Piece(
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


def last_buckets(buckets: Sequence[Sequence[Sequence[Piece]]], count: int) -> list[int]:
    """The bucket after which nothing of a parameter is left to pack, for each."""
    ends = [0] * count
    for number, owners in enumerate(buckets):
        for pieces in owners:
            for piece in pieces:
                ends[piece.index] = number
    return ends
