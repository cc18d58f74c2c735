# SPDX-License-Identifier: Apache-2.0
"""Buckets of sketches that are sent one after the other, the first while backward goes on.

Ranks send the buckets in one order, whenever each comes to it: a bucket waits until those before it
have been sent. The last is sent at the step, however early it is complete. So every rank says in it
whether its gradients have been kept until then: one whose backward has failed, or whose gradients
were zeroed, takes part with zeros in what it has begun, and the others learn of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flora_dist.gradients.average_records import RecordBuckets
from flora_dist.gradients.route import Mean


class Pipeline:
    """The buckets of parameters that take the same route."""

    def __init__(self, buckets: Sequence[tuple[Sequence[int], RecordBuckets]]) -> None:
        """``buckets``: with the parameters of each, equal on all ranks."""
        self._buckets = buckets
        self._places = {
            index: place for place, (indices, _) in enumerate(buckets) for index in indices
        }
        self._begin()

    def _begin(self) -> None:
        self._missing = [set(indices) for indices, _ in self._buckets]
        self._num_sent = 0

    @property
    def is_under_way(self) -> bool:
        """Whether a message has been sent whose means are not here yet."""
        return self._num_sent > 0

    def has_sent(self, index: int) -> bool:
        """Whether a parameter's sketches have been sent."""
        return self._places.get(index, self._num_sent) < self._num_sent

    def arrived(self, index: int) -> None:
        """A parameter's last gradient is in: send what is complete, but for the last bucket."""
        place = self._places.get(index)
        if place is None:
            return
        self._missing[place].discard(index)
        while self._num_sent < len(self._buckets) - 1 and not self._missing[self._num_sent]:
            _, bucket = self._buckets[self._num_sent]
            bucket.send()
            self._num_sent += 1

    def run(self) -> Iterator[tuple[int, Mean]]:
        """Send the rest, and await the means: of each parameter, after which nothing is under way.

        Raises:
            RuntimeError: a rank has dropped gradients of which it had sent some, or the optimizer
                has loaded another step since.
        """
        for _, bucket in self._buckets:
            bucket.check_basis()
        dropped, found = self._ended()
        if dropped:
            raise RuntimeError(
                "gradients whose sketches are sent during backward must be kept until the step; "
                f"ranks {dropped} of the group have dropped theirs. A backward that fails, or "
                "zero_grad() after it, must do so on all ranks."
            )
        for indices, means in found:
            yield from zip(indices, means, strict=True)

    def drop(self) -> None:
        """Take part with zeros in what has been begun, and forget it; accumulators are empty."""
        if not self.is_under_way:
            return
        for _, bucket in self._buckets[self._num_sent :]:
            bucket.drop()
        self._ended()

    def _ended(self) -> tuple[list[int], list[tuple[Sequence[int], list[Mean]]]]:
        """Ranks that have dropped their gradients, and the means of each bucket.

        Means of one bucket travel while sketches of the next do.
        """
        self._begin()
        for _, bucket in self._buckets:
            bucket.send()
        for _, bucket in self._buckets:
            bucket.send_means()
        dropped = self._buckets[-1][1].who_dropped()
        return dropped, [(indices, bucket.run()) for indices, bucket in self._buckets]


def cut_by_bytes(sizes: Sequence[tuple[int, int]], limit: int) -> list[list[int]]:
    """Parameters in buckets of at most so many bytes each, or of one parameter.

    Args:
        sizes: the parameters in their order, and the bytes of each.
        limit: of a bucket.

    >>> cut_by_bytes([(3, 5), (2, 4), (1, 9), (0, 1)], 10)
    [[3, 2], [1, 0]]
    """
    buckets: list[list[int]] = []
    room = 0
    for index, size in sizes:
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append(index)
        room -= size
    return buckets
