# SPDX-License-Identifier: Apache-2.0
"""What is kept for a parameter: its geometry in blocks and the one list of its state tensors.

Three readers: the optimizer allocates from it, checkpoints check against it, the planner adds it
up. Standard library only; dtypes are names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flora_dist.core.records import FEW_BITS, Code
from flora_dist.core.state.settings import RELATIVE, TWO_MOMENTS, FloraConfig
from flora_dist.core.tiles import Grid

FORMAT_VERSION = 1
"""Version of the state's names, shapes and meanings; kept with every parameter's state."""
FORMAT_OF_RECORDS = 2
"""The same, of a state whose momentum is records: only readers that know them may load it."""
LEVELS = ("dense", "sharded", "compressed", "fused")
"""What of the gradients is compressed; kept as an index with every parameter's state."""
VECTOR_EPS = 1e-12
"""Smallest eps of 1-D parameters: the rounding noise of a gradient that is truly zero (a key bias
in attention) must not be normalised into full steps. Of normalised sketches too."""


WIDEST_ASPECT = 4
"""The authors' torch code leaves what is longer or wider dense, so as to skip embeddings."""
SMALLEST_BATCHED = 8
"""Last dim from which a 3-D parameter is a batch of matrices; below, a 1-D convolution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A parameter as a batch of E matrices of N rows and M columns, cut in blocks or dense."""

    shape: tuple[int, ...]
    """The parameter's own shape, all ranks together."""
    num_matrices: int
    """E: experts of a batch, 1 otherwise."""
    num_rows: int
    """N."""
    num_columns: int
    """M."""
    block: int
    """B, columns per block; M where dense."""
    rank: int | None
    """R, numbers per block; None where dense."""
    bits: int
    """Of each number; 32 stands for the arithmetic's dtype. Of no meaning where dense."""
    dense_because: str
    """Why the parameter is dense; empty where compressed."""
    falls_short: bool = False
    """Dense although compressing was asked for: it would not halve the parameter."""
    is_vector: bool = False
    """At most one dimension: the second moment is kept per element, not factored."""
    moments: int = 1
    """Kept of each number: 2 where its second moment follows the R numbers of its block."""

    @property
    def code(self) -> Code | None:
        """How a block's numbers are written as a record of bytes; None: as R numbers."""
        if self.rank is None or self.bits not in FEW_BITS:
            return None
        return Code(bits=self.bits, numbers=self.rank)

    @property
    def numbers(self) -> int:
        """Kept per block: R of each moment."""
        assert self.rank is not None, self
        return self.rank * self.moments

    @property
    def width(self) -> int:
        """Entries that a tensor of sketches keeps per block: numbers, or a record's bytes."""
        return self.numbers if self.code is None else self.code.bytes

    @property
    def blocks_per_row(self) -> int:
        """K; the last block of a row may be shorter."""
        return -(-self.num_columns // max(1, self.block))


Along = Literal["rows", "columns", "elements"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One tensor of a parameter's state, all ranks together."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """"bfloat16", "uint8" for records, or "arithmetic": float32, float64 for a float64
    parameter."""
    along: Along
    """How it is cut when the parameter is: with the rows (trailing dims whole), with the elements,
    or not at all except by matrices (columns)."""
    block: int = 1
    """along="rows": columns of the parameter that one entry (``shape[-1]`` numbers of a momentum,
    one of ``row``) stands for."""


def geometry_of(name: str, shape: tuple[int, ...], config: FloraConfig) -> Geometry:
    """Cut a parameter in blocks by its shape and settings alone, never by its layout.

    >>> g = geometry_of("w", (10, 100), FloraConfig(rank=8, block=64))
    >>> g.blocks_per_row, g.block, g.rank
    (2, 64, 8)
    >>> geometry_of("narrow", (10, 6), FloraConfig(rank=8, block=64)).block
    4

    Raises:
        ValueError: ``block="full"`` with hadamard on a side that is no power of two.
    """
    seen = _as_authors_see(shape, config)
    rank, bits = config.rank, config.sketch_bits
    return geometry_at(name, seen, config, rank=rank, bits=bits, moments=moments_of(config))


def moments_of(config: FloraConfig) -> int:
    """How many are kept of each sketched number."""
    return 2 if config.momentum in TWO_MOMENTS else 1


def _as_authors_see(shape: tuple[int, ...], config: FloraConfig) -> tuple[int, ...]:
    """Transposed where they combine rows, which are fewer than columns."""
    if config.compress != "authors" or config.rank is None or 0 in shape:
        return shape
    return shape if _authors_leave(shape, config.rank) or shape[0] >= shape[1] else shape[::-1]


def _authors_leave(shape: tuple[int, ...], rank: int) -> str:
    """Why the authors' torch code keeps a shape dense; empty where it does not."""
    if len(shape) != 2:
        return "not 2-D"
    small, large = sorted(shape)
    if large > WIDEST_ASPECT * small:
        return f"aspect ratio above {WIDEST_ASPECT}"
    return f"rank {rank} above the smaller side" if rank > small else ""


def geometry_at(
    name: str,
    shape: tuple[int, ...],
    config: FloraConfig,
    *,
    rank: int | Literal["block"] | None,
    bits: int,
    moments: int = 1,
) -> Geometry:
    """As ``geometry_of`` with another rank, "block" for all numbers of a block, and bits."""
    num_matrices, num_rows, num_columns = matrix_sizes(shape)
    block, kept, reason, falls_short = num_columns, None, "", False
    if len(shape) <= 1:
        reason = "1-D"
    elif rank is None:
        reason = "rank=None"
    elif 0 in shape:
        reason = "no elements"
    elif config.compress == "authors":
        assert rank != "block", "gradients are not sketched so"
        if not (reason := _authors_leave(shape, rank)):
            block, kept = _block_and_rank(name, num_rows, num_columns, config, rank, bits)
    else:
        block, kept = _block_and_rank(name, num_rows, num_columns, config, rank, bits)
        if not _halves(num_columns, block, kept, bits, moments):
            few = f" in {bits} bits" if bits in FEW_BITS else ""
            few += f" and {moments} moments" if moments > 1 else ""
            reason = f"rank {kept} per block of {block}{few} would not halve {num_columns} columns"
            block, kept, falls_short = num_columns, None, True
    return Geometry(
        shape=shape,
        num_matrices=num_matrices,
        num_rows=num_rows,
        num_columns=num_columns,
        block=block,
        rank=kept,
        bits=bits,
        dense_because=reason,
        falls_short=falls_short,
        is_vector=len(shape) <= 1,
        moments=moments,
    )


def is_batch(shape: tuple[int, ...]) -> bool:
    """Whether a shape is a batch of matrices, each with its own sketch and statistics (experts).

    A 3-D shape is, unless its last dim is that of a 1-D convolution's kernel: a matrix per output
    channel would have thousands of sketches of a few numbers each.
    """
    return len(shape) == 3 and shape[2] >= SMALLEST_BATCHED


def matrix_sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """E, N, M of a parameter: experts are a batch, other dimensions fold into the columns.

    >>> [matrix_sizes(s) for s in ((5,), (4, 5), (3, 4, 16), (80, 40, 3), (8, 3, 2, 2))]
    [(1, 1, 5), (1, 4, 5), (3, 4, 16), (1, 80, 120), (1, 8, 12)]
    """
    if len(shape) <= 1:
        return 1, 1, math.prod(shape)
    if is_batch(shape):
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def grid_of(shape: tuple[int, ...], block: int) -> Grid:
    """A parameter's matrices, cut in blocks of so many columns."""
    matrices, rows, columns = matrix_sizes(shape)
    return Grid(num_matrices=matrices, num_rows=rows, num_columns=columns, block=block)


def _halves(columns: int, block: int, rank: int, bits: int, moments: int) -> bool:
    """Whether sketches take at most half of a row: its numbers, or with few bits its fp32 bytes."""
    blocks = -(-columns // block)
    if bits not in FEW_BITS:
        return 2 * blocks * rank * moments <= columns
    return 2 * blocks * Code(bits=bits, numbers=rank).bytes <= 4 * columns


def _block_and_rank(
    name: str,
    rows: int,
    columns: int,
    config: FloraConfig,
    rank: int | Literal["block"],
    bits: int,
) -> tuple[int, int]:
    if config.block == "full":
        side = min(rows, columns)
        if config.sketch == "hadamard" and side.bit_count() != 1:
            raise ValueError(
                f"a hadamard block must be a power of two; {name!r} with block='full' has {side} "
                "as the smaller of rows and columns. Pass block=64, sketch='rademacher', or "
                "rank=None for its group."
            )
        if rank == "block" or (rank > side and bits in FEW_BITS):
            return side, side
        return side, rank
    block = min(int(config.block), 1 << (columns.bit_length() - 1))
    whole = int(config.block) if rank == "block" else rank
    return block, max(1, whole * block // int(config.block))


def has_momentum(geometry: Geometry, config: FloraConfig) -> bool:
    """Whether a parameter has a momentum: no matrix has under "vectors", nothing under "none"."""
    return config.momentum != "none" and (geometry.is_vector or config.momentum != "vectors")


def state_tensors(geometry: Geometry, config: FloraConfig) -> tuple[StateTensor, ...]:
    """The state of one parameter; shapes are of the whole parameter.

    Vectors keep ``second`` per element; matrices keep Adafactor's ``row`` and ``column`` means of
    the squared gradient, under ``growth`` the ``norm`` of the last update, and where their lr is
    relative ``start``, the root mean square of the weight at the first step. ``momentum`` has rank
    numbers per block, then their second moments where the rule keeps these, or a record of as many
    bytes as they take in few bits; where dense, one number per element.
    """
    dense = "bfloat16" if config.state_dtype == "bfloat16" else "arithmetic"
    shape = geometry.shape
    batch = shape[:1] if is_batch(shape) else ()
    lines = (*batch, geometry.num_rows)
    tensors = []
    if has_momentum(geometry, config):
        if geometry.rank is None:
            tensors.append(StateTensor(name="momentum", shape=shape, dtype=dense, along="elements"))
        else:
            sketch = (*lines, geometry.blocks_per_row, geometry.width)
            low = "bfloat16" if config.sketch_bits == 16 else "arithmetic"
            tensors.append(
                StateTensor(
                    name="momentum",
                    shape=sketch,
                    dtype=low if geometry.code is None else "uint8",
                    along="rows",
                    block=geometry.block,
                )
            )
    if geometry.is_vector:
        tensors.append(
            StateTensor(name="second", shape=shape, dtype="arithmetic", along="elements")
        )
    else:
        columns = (*batch, geometry.num_columns)
        tensors += [
            StateTensor(
                name="row",
                shape=lines,
                dtype="arithmetic",
                along="rows",
                block=geometry.num_columns,
            ),
            StateTensor(name="column", shape=columns, dtype="arithmetic", along="columns"),
        ]
        if config.growth is not None:
            norm = (*batch, 1)
            tensors.append(
                StateTensor(name="norm", shape=norm, dtype="arithmetic", along="columns")
            )
        if config.scale_parameter == RELATIVE:
            start = (*batch, 1)
            tensors.append(
                StateTensor(name="start", shape=start, dtype="arithmetic", along="columns")
            )
    return tuple(tensors)


def format_of(entries: Sequence[StateTensor]) -> int:
    """The oldest version of the state's format that has all of these."""
    has_records = any(entry.dtype == "uint8" for entry in entries)
    return FORMAT_OF_RECORDS if has_records else FORMAT_VERSION
