# SPDX-License-Identifier: Apache-2.0
"""A batch as a flat table of int64 for the kernels; the structs are in ``cpu/plan.h``.

Shape suffixes: E matrices of a tile, N rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.sketch.quantise import value_table
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.batch import Batch, Member
from flora_dist.core.step.momentum_rules import (
    AdEMAMixRule,
    ApolloRule,
    BlendRule,
    FloraRule,
    FloraStrictRule,
    Rule,
    SubspaceAdamRule,
    rule_of,
)
from flora_dist.core.step.normalise import kind_of
from flora_dist.core.step.views import as_batches, carve, momentum_batches
from flora_dist.core.tiles import Tile

VERSION = 5
"""``kTableVersion``."""
TILE_ELEMENTS = 1 << 16
"""Of a tile, about: enough to pay for the sums that are kept of each, few enough for a cache."""
ROWS_PER_SUM = 32
"""Least rows of a tile for each sum by columns: a step's memory stays below 4 % of the weights."""
LARGEST_SKETCH = 1 << 15
"""Numbers of a sketch matrix that the kernels take: it must stay in a CPU's cache. Beyond, products
are nearly all of the work, and those of torch's library are better."""
LARGEST_SIDE = 256
"""Of tiles that are made orthogonal, likewise: three of them must stay in a core's cache."""
CHUNK = 512
"""``kChunk``: what stands in for the block of a dense momentum."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OCTETS = 5
"""``kOctets``: a momentum in records."""
RULES: dict[type[Rule] | None, int] = {
    None: 0,
    BlendRule: 1,
    FloraRule: 2,
    FloraStrictRule: 3,
    AdEMAMixRule: 4,
    SubspaceAdamRule: 5,
    ApolloRule: 6,
}
NORMALISATIONS = {"factored": 0, "rows": 1, "columns": 2, "raw": 3}


def floats(*shape: int) -> Tensor:
    """Room for the float32 that kernels write, whatever the process's default dtype and device."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def beyond_kernels(config: FloraConfig) -> Iterator[str]:
    """Settings that step matrices by torch's operators alone, as they are written."""
    if config.orthogonalise is not None and config.orthogonalise > LARGEST_SIDE:
        yield f"orthogonalise={config.orthogonalise}"
    if config.normalise not in NORMALISATIONS:
        yield f"normalise={config.normalise!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The table of a batch, and what Python must know of it too."""

    numbers: Tensor
    rule: Rule | None
    num_sums: int
    """Sums by columns in message 1: columns, squares, cross."""
    num_rows: int
    """Rows of all tiles."""
    num_tiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A tile of a member's part, and where its tensors lie."""

    member: int
    place: int
    """Among the member's tiles."""
    tile: Tile
    weight: Tensor
    momentum: Tensor | None
    row: Tensor | None
    gradient: int
    """Elements before it in the member's gradient."""


@dataclass
class _Running:
    """Where the next tile's rows and partial sums begin."""

    rows: int = 0
    partials: int = 0


def make_table(batch: Batch) -> Table:
    """Cut a batch of matrices in tiles, and write down all that holds for every step."""
    rule = rule_of(batch.config, batch.geometry)
    knows_early = batch.config.bounds_matrices and not (rule is not None and rule.asks_update)
    num_sums = 1
    if knows_early:
        num_sums = 3 if rule is not None and rule.asks_history else 2
    sources = [source for m in range(len(batch.members)) for source in _sources(batch, m)]
    running = _Running()
    tiles = [tile for source in sources for tile in _tiles(batch, source, num_sums, running)]
    return Table(
        numbers=_joined(batch, tiles, rule, num_sums, running),
        rule=rule,
        num_sums=num_sums,
        num_rows=running.rows,
        num_tiles=len(tiles),
    )


def make_vector_table(batch: Batch) -> Table:
    """The same of a batch of vectors: stretches of their elements."""
    rule = rule_of(batch.config, batch.geometry)
    tiles = [
        _stretch(member, index, start, width)
        for index, member in enumerate(batch.members)
        for width in (member.weight.numel(),)
        for start in range(0, width, TILE_ELEMENTS)
    ]
    numbers = _joined(batch, tiles, rule, 1, _Running())
    return Table(numbers=numbers, rule=rule, num_sums=1, num_rows=0, num_tiles=len(tiles))


def _joined(
    batch: Batch,
    tiles: Sequence[Sequence[int]],
    rule: Rule | None,
    num_sums: int,
    running: _Running,
) -> Tensor:
    size, config = batch.geometry, batch.config
    is_vector = size.is_vector
    members, each = len(batch.members), 1 if is_vector else batch.matrices_here
    momentum = batch.members[0].local.get("momentum")
    header = [
        VERSION,
        RULES[None if rule is None else type(rule)],
        int(size.rank is None),
        DTYPES[batch.members[0].weight.dtype],
        0 if momentum is None else DTYPES.get(momentum.dtype, OCTETS),
        int(config.stochastic_rounding),
        CHUNK if size.rank is None or rule is None else size.block,
        0 if size.rank is None or rule is None else size.rank,
        int(config.sketch == "hadamard"),
        size.num_rows,
        size.num_columns,
        members * each,
        members * (1 if is_vector else batch.matrices_summed),
        0 if is_vector else batch.held.start,
        0 if is_vector else members * len(batch.members[0].cuts.rows),
        int(batch.members[0].cuts.are_few),
        0 if is_vector else members * len(batch.members[0].cuts.blocks),
        members,
        len(tiles),
        len(batch.members[0].tiles),
        num_sums,
        running.partials,
        int(config.scales_vectors if is_vector else config.scales_matrices),
        int(config.clip is not None),
        *_momentum_code(size, momentum),
        0 if is_vector else NORMALISATIONS[kind_of(batch)],
        int(config.growth is not None),
        0 if is_vector else config.orthogonalise or 0,
        1 if size.rank is None else size.moments,
    ]
    matrices = _matrices(batch, [tile[3] for tile in tiles], each)
    rows = [*header, *matrices, *(number for tile in tiles for number in tile)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _momentum_code(size: Geometry, momentum: Tensor | None) -> tuple[int, int]:
    """Bits of a momentum in records, and where their values stand."""
    if momentum is None or momentum.dtype != torch.uint8:
        return 0, 0
    assert size.code is not None, "records have a code"
    table = value_table(size.code.bits, torch.float32, torch.device("cpu"))
    return size.code.bits, table.data_ptr()


def _matrices(batch: Batch, owners: Sequence[int], each: int) -> Iterator[int]:
    """First and last tile, member, C, norm and start of each; its tiles follow each other."""
    start = 0
    for matrix in range(len(batch.members) * each):
        stop = start
        while stop < len(owners) and owners[stop] == matrix:
            stop += 1
        local, place = batch.members[matrix // each].local, matrix % each
        column, numbers = local.get("column"), (local.get("norm"), local.get("start"))
        yield from (
            start,
            stop,
            matrix // each,
            0 if column is None else column.data_ptr() + 4 * batch.geometry.num_columns * place,
            *(0 if each is None else each.data_ptr() + 4 * place for each in numbers),
        )
        start = stop
    assert start == len(owners), "a matrix's tiles must follow each other"


def _sources(batch: Batch, index: int) -> Iterator[_Source]:
    member, size = batch.members[index], batch.geometry
    weights = as_batches(member.weight, member.tiles, shape=size.shape)
    rows = carve(member.local["row"], [tile.sizes[:2] for tile in member.tiles])
    momenta: Sequence[Tensor | None] = [None] * len(member.tiles)
    if "momentum" in member.local:
        momenta = momentum_batches(member.local["momentum"], member.tiles, size)
    before = 0
    for place, tile in enumerate(member.tiles):
        yield _Source(
            member=index,
            place=place,
            tile=tile,
            weight=weights[place],
            momentum=momenta[place],
            row=rows[place],
            gradient=before,
        )
        before += tile.num_elements


def _tiles(
    batch: Batch, source: _Source, num_sums: int, running: _Running
) -> Iterator[tuple[int, ...]]:
    """Rows of one matrix each: ``struct Tile``."""
    size, tile = batch.geometry, source.tile
    _, rows, width = tile.sizes
    together = max(TILE_ELEMENTS // width, ROWS_PER_SUM * num_sums)
    if batch.config.orthogonalise is not None:  # whole squares
        together += -together % batch.config.orthogonalise
    first_matrix = source.member * batch.matrices_here - batch.members[0].matrices[0]
    for matrix in range(*tile.matrices):
        for start in range(0, rows, together):
            count = min(together, rows - start)
            before = (matrix - tile.matrices[0]) * rows + start  # rows, within the source
            line = matrix * size.num_rows + tile.rows[0] + start
            momentum, stride = _momentum(source, before)
            assert source.row is not None
            yield (
                source.member,
                source.place,
                before,
                first_matrix + matrix,
                line,
                count,
                *tile.columns,
                int(tile.columns != (0, size.num_columns)),
                source.weight.data_ptr() + source.weight.element_size() * before * width,
                source.gradient + before * width,
                momentum,
                stride,
                source.row.data_ptr() + 4 * before,
                running.rows,
                running.partials,
                *_slots(batch, source, line),
            )
            running.rows += count
            running.partials += num_sums * width


def _momentum(source: _Source, before: int) -> tuple[int, int]:
    """Address of a row's momentum, and numbers from row to row."""
    if source.momentum is None:
        return 0, 0
    stride = source.momentum.stride(1)
    address = source.momentum.data_ptr() + source.momentum.element_size() * before * stride
    return address, stride


def _slots(batch: Batch, source: _Source, line: int) -> tuple[int, int, int]:
    """Places of a tile's cut rows and cut blocks in the messages; -1 where there are none."""
    size, tile, cuts = batch.geometry, source.tile, batch.members[source.member].cuts
    if tile.columns == (0, size.num_columns):
        return -1, -1, -1
    row = source.member * len(cuts.rows) + cuts.row_slot(line)
    return row, *_edges(size, tile, source.member, batch.members[source.member], line)


def _edges(size: Geometry, tile: Tile, index: int, member: Member, line: int) -> tuple[int, int]:
    cut = tile.cut_blocks(size.block, size.num_columns) if size.rank is not None else ()
    if "momentum" not in member.local:
        cut = ()
    first, last = tile.columns[0] // size.block, (tile.columns[1] - 1) // size.block

    def slot(block: int) -> int:
        return index * len(member.cuts.blocks) + member.cuts.block_slot(line, block)

    head = slot(first) if first in cut else -1
    return head, slot(last) if last in cut and last != first else -1


def _stretch(member: Member, index: int, start: int, width: int) -> tuple[int, ...]:
    """Elements of a vector: ``struct Tile`` too, V in the place of R."""
    first = member.tiles[0].columns[0]
    momentum = member.local.get("momentum")
    return (
        index,
        0,
        0,
        index,
        0,
        1,
        first + start,
        first + min(start + TILE_ELEMENTS, width),
        0,
        member.weight.data_ptr() + member.weight.element_size() * start,
        start,
        0 if momentum is None else momentum.data_ptr() + momentum.element_size() * start,
        0,
        member.local["second"].data_ptr() + 4 * start,
        0,
        0,
        -1,
        -1,
        -1,
    )
