# SPDX-License-Identifier: Apache-2.0
"""What a batch's kernels are compiled for: tiles, ranks and dtypes.

Numbers of rows and warps are chosen by what the compiler makes of them (registers, spills; see
``tests/kernels/gpu/lint.py``), not by a clock: no GPU has run these kernels yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from flora_dist.core.state.settings import RELATIVE, FloraConfig
from flora_dist.core.step.batch import Batch
from flora_dist.core.step.momentum_rules import rule_of
from flora_dist.core.step.normalise import kind_of
from flora_dist.kernels.gpu.access import (
    BY_GROWTH,
    BY_SIZE,
    CLIPPED,
    GROWING,
    UNBOUNDED,
    UNSCALED,
)
from flora_dist.kernels.tables import NORMALISATIONS, RULES

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
TILE_ROWS = 32
"""Rows of a program where it takes few columns at a time."""
SETTLED_ROWS = 128
"""Cut rows whose R one program works out."""
AS_TORCH = {"num_warps": 4, "enable_fp_fusion": False}
"""Where R and C are made: with the bits of torch's operators, which other ranks may run."""
MEASURED_ROWS = 64
"""Rows of a program that keeps whole ones: its sums by column are 1/8 byte for each element."""
LONGEST_ROW = 8192
"""That a program keeps in registers, beside two sums by column."""
MEASURE_OPTIONS = {"num_warps": 4}
ROW_OPTIONS = {"num_warps": 8, "maxnreg": 128}
RECORD_ROWS = 16
"""Rows of a program that writes records."""
RECORD_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""A product and a sum are rounded one after the other, as torch does."""
FINISH_OPTIONS = {"num_warps": 8, "maxnreg": 128}
"""A GPU's SM then holds two such programs."""
EXPANDED_OPTIONS = {"num_warps": 8, "maxnreg": 255}
"""Of a program of ``measure`` that expands gradients, of which an SM holds one: 168 registers leave
no room for another either, and were too few on sm_100."""
SKETCHED_ROWS = 16
"""Rows of a program of ``finish`` that expands a gradient, or reads a momentum in few bits."""
SKETCHED_OPTIONS = {"num_warps": 4, "maxnreg": 168}
"""Of such a program: with 32 rows and 128 registers some are spilled. An SM holds three."""
MOMENTS_OPTIONS = {"num_warps": 4, "maxnreg": 255}
"""Of one that expands a gradient under a rule of two moments: 168 were too few. An SM holds two."""
RECORDING_OPTIONS = {**SKETCHED_OPTIONS, "enable_fp_fusion": False}
"""Where the momentum is written in few bits: products and sums are rounded as torch rounds them."""
_AT_ONCE = 8192
"""Elements that a program of 256 threads reads at a time: 32 by each."""
DENSE_WIDTH = 64
"""Columns of a tile where no block asks for its own."""
SMALLEST_PRODUCT = 16
"""Least rows and columns of a matrix product inside a kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Constants of a batch of matrices."""

    rule: int
    clips_input: bool
    """X is clipped before the rule; otherwise U after it."""
    rank: int
    """0 where no sketch is read."""
    padded_rank: int
    """Up to a power of two that products can take."""
    width: int
    """Columns of a tile: those of a block."""
    blocks: int
    """Of a row."""
    row_width: int
    """Whole rows up to a power of two; 0 where they are read piece by piece."""
    row_step: int
    """Rows that are read at a time."""
    group: int
    """Blocks that one program steps."""
    sum_tiles: int
    sum_width: int
    settle_width: int
    weight: Any
    momentum: Any
    normalise: int
    kept_bits: int
    """Of a momentum in few bits, else 0."""


def shapes_of(batch: Batch, gradient_block: int = 0) -> Shapes:
    """Choose them; ``gradient_block``: of gradients that are known by sketches, 0 of dense ones."""
    rule, size = rule_of(batch.config, batch.geometry), batch.geometry
    rank = 0 if rule is None or size.rank is None else size.rank
    width = gradient_block or (size.block if rank else DENSE_WIDTH)
    momentum = batch.members[0].local.get("momentum")
    row_width = triton.next_power_of_2(size.num_columns)
    reads_more = batch.config.scales_matrices or (rule is not None and rule.asks_history)
    if gradient_block or reads_more or row_width > LONGEST_ROW:
        row_width = 0
    return Shapes(
        rule=RULES[None if rule is None else type(rule)],
        clips_input=rule is None or rule.clips_input,
        rank=rank,
        padded_rank=padded(rank),
        width=width,
        blocks=triton.cdiv(size.num_columns, width),
        row_width=row_width,
        row_step=row_step_of(row_width),
        group=4,
        sum_tiles=16,
        sum_width=128,
        settle_width=1024,
        weight=DTYPES[batch.members[0].weight.dtype],
        normalise=0 if size.is_vector else NORMALISATIONS[kind_of(batch)],
        momentum=tl.float32 if momentum is None else DTYPES.get(momentum.dtype, tl.uint8),
        kept_bits=0 if size.code is None or not rank else size.code.bits,
    )


def padded(rank: int) -> int:
    """Up to a power of two that products can take."""
    return max(SMALLEST_PRODUCT, 1 << max(0, rank - 1).bit_length())


def bound_of(config: FloraConfig) -> Any:
    """What bounds the updates of matrices."""
    if config.growth is not None:
        return GROWING
    return UNBOUNDED if config.clip is None else CLIPPED


def scaled_by(config: FloraConfig) -> Any:
    """What the step size of matrices depends on."""
    if config.scale_parameter == RELATIVE:
        return BY_GROWTH
    return BY_SIZE if config.scales_matrices else UNSCALED


def pass_of(*, bits: int, kept_bits: int, moments: int) -> tuple[int, dict[str, Any]]:
    """Rows of a program of the second look, and its options.

    ``bits``: of a gradient's sketches; ``kept_bits``: of a momentum in few bits; 0 where not.
    ``moments``: kept of each sketched number.
    """
    if kept_bits:
        return SKETCHED_ROWS, RECORDING_OPTIONS
    if bits and moments > 1:
        return SKETCHED_ROWS, MOMENTS_OPTIONS
    return (SKETCHED_ROWS, SKETCHED_OPTIONS) if bits else (TILE_ROWS, FINISH_OPTIONS)


def measure_options(bits: int) -> dict[str, Any]:
    """Of a program that sums rows piece by piece; ``bits``: of a gradient's sketches, 0: none."""
    return EXPANDED_OPTIONS if bits else MEASURE_OPTIONS


def row_step_of(row_width: int) -> int:
    """Rows of so many columns that are read at a time."""
    return max(1, min(TILE_ROWS, _AT_ONCE // max(1, row_width)))
