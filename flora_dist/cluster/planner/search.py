# SPDX-License-Identifier: Apache-2.0
"""The smallest cluster on which a method fits: ranks of one node first, then whole nodes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flora_dist.cluster.planner.estimate import Estimate, estimate
from flora_dist.cluster.planner.methods import Method
from flora_dist.cluster.planner.request import Request

LIMIT = 1024
"""Ranks beyond which nothing is looked for."""

Methods = Callable[[Request], Iterator[Method]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallestCluster:
    """Where a method fits first."""

    nodes: int
    gpus: int
    """Per node."""
    fits: bool
    """False: not even here, on the largest cluster that was tried."""
    estimate: Estimate
    """On that cluster."""


def search(request: Request, methods: Methods, memory: int) -> list[SmallestCluster]:
    """Find for each method the fewest ranks whose fullest holds at most ``memory`` bytes.

    A rank of a larger cluster is taken to hold no more, which padding breaks by a few bytes; one
    rank alone, which sends nothing and so copies nothing to send, is looked at first.

    Args:
        request: whose ``gpus`` are what a node has; ``nodes`` is not read.
        methods: of a request, in the same order for each.
        memory: bytes per rank.
    """
    clusters = [replace(request, nodes=nodes, gpus=gpus) for nodes, gpus in sizes(request.gpus)]
    count = len([*methods(request)])
    return [_first(clusters, methods, place, memory) for place in range(count)]


def largest_micro_batch(request: Request, methods: Methods, memory: int) -> int:
    """The most sequences of a forward with which the method asked for fits; 0: not even one."""

    def too_much(sequences: int) -> bool:
        asked = replace(request, micro_batch=sequences)
        return estimate(asked, next(methods(asked))).total > memory

    limit = 1
    while not too_much(limit) and limit < LIMIT:
        limit *= 2
    return bisect_left(range(1, limit + 1), 1, key=too_much)


def _first(
    clusters: Sequence[Request], methods: Methods, place: int, memory: int
) -> SmallestCluster:
    def estimated(index: int) -> Estimate:
        return estimate(clusters[index], [*methods(clusters[index])][place])

    def fits(index: int) -> bool:
        return estimated(index).total <= memory

    index = 0
    if not fits(0):
        index = min(bisect_left(range(len(clusters)), 1, key=fits), len(clusters) - 1)
    found = estimated(index)
    return SmallestCluster(
        nodes=clusters[index].nodes,
        gpus=clusters[index].gpus,
        fits=found.total <= memory,
        estimate=found,
    )


def sizes(gpus: int, limit: int = LIMIT) -> Iterator[tuple[int, int]]:
    """Clusters as (nodes, ranks per node), growing: 1, 2, 4 .. ranks, then full nodes.

    >>> list(sizes(8, limit=24))
    [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (3, 8)]
    >>> list(sizes(6, limit=12))
    [(1, 1), (1, 2), (1, 4), (1, 6), (2, 6)]
    """
    size = 1
    while size < gpus:
        yield 1, size
        size *= 2
    for nodes in range(1, max(1, limit // gpus) + 1):
        yield nodes, gpus
