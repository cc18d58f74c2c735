# SPDX-License-Identifier: Apache-2.0
"""Which elements of which parameters each rank holds, as FSDP2 and DeepSpeed 0.19 cut them.

rows    FSDP2: chunks of ceil(n / W) of the first dim; every rank stores a whole chunk, so that the
        first rank, whose chunk is full, holds most of everything
line    ZeRO 1, 2: all parameters in one line, padded to a multiple of 2 W and cut in W equal parts
each    ZeRO 3: every parameter's elements in W chunks of ceil(numel / W)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from flora_dist.cluster.planner.model import Parameter
from flora_dist.cluster.planner.request import Sharding
from flora_dist.core.state.spec import matrix_sizes
from flora_dist.core.tiles import Tile, tiles_of_span

ALIGNMENT = 2
"""Elements per rank to a multiple of which DeepSpeed pads its line: nccl_start_alignment_factor."""

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole: stage3_param_persistence_threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds of one parameter; never nothing."""

    parameter: Parameter
    elements: int
    stored: int
    """Elements with the padding that its memory has."""
    tiles: tuple[Tile, ...]


@lru_cache(maxsize=64)
def shards_by_rank(
    parameters: tuple[Parameter, ...], sharding: Sharding, ranks: int
) -> tuple[tuple[Shard, ...], ...]:
    """The shards of the ranks that may hold most of something.

    Those are all ranks of ZeRO's line, rank 0 where all are alike or rank 0 is full, and ranks at
    the ends and in the middle where every parameter is cut (neighbours cut rows in other places).
    """
    if sharding == "line":
        return tuple(map(tuple, _line(parameters, ranks)))
    chosen = {0}
    if sharding == "each":
        chosen = {0, 1, ranks // 2, ranks - 1} & set(range(ranks))
    return tuple(tuple(_chunks(parameters, sharding, ranks, rank)) for rank in sorted(chosen))


def stays_whole(parameter: Parameter) -> bool:
    """Whether ZeRO-3 keeps it on every rank and gathers it after a step alone."""
    return parameter.numel <= PERSISTENT


def line_length(parameters: Sequence[Parameter], ranks: int) -> int:
    """Elements of ZeRO's line, padding included."""
    step = ALIGNMENT * ranks
    return step * math.ceil(sum(parameter.numel for parameter in parameters) / step)


def chunk(parameter: Parameter, sharding: Sharding, ranks: int) -> int:
    """Elements that a full chunk of a parameter has, where each is cut for itself or whole."""
    if sharding == "whole":
        return parameter.numel
    if sharding == "rows":
        rows = parameter.shape[0]
        return math.ceil(rows / ranks) * (parameter.numel // rows)
    return math.ceil(parameter.numel / ranks)


def _chunks(
    parameters: Sequence[Parameter], sharding: Sharding, ranks: int, rank: int
) -> Iterator[Shard]:
    for parameter in parameters:
        size = chunk(parameter, sharding, ranks)
        start, stop = (min(parameter.numel, size * place) for place in (rank, rank + 1))
        if start < stop:
            yield _shard(parameter, start, stop, size)


def _line(parameters: Sequence[Parameter], ranks: int) -> list[list[Shard]]:
    size = line_length(parameters, ranks) // ranks
    found: list[list[Shard]] = [[] for _ in range(ranks)]
    offset = 0
    for parameter in parameters:
        end = offset + parameter.numel
        for rank in range(offset // size, -(-end // size)):
            start = max(size * rank, offset) - offset
            stop = min(size * (rank + 1), end) - offset
            found[rank].append(_shard(parameter, start, stop, stop - start))
        offset = end
    return found


def _shard(parameter: Parameter, start: int, stop: int, stored: int) -> Shard:
    _, rows, columns = matrix_sizes(parameter.shape)
    tiles = tiles_of_span(start, stop, num_rows=rows, num_columns=columns)
    return Shard(parameter=parameter, elements=stop - start, stored=stored, tiles=tiles)
