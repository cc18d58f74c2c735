# SPDX-License-Identifier: Apache-2.0
"""C <- C + X A^T, block by block, read in any dtype and summed in float32.

Both uses of a gradient's sketch: a gradient that is accumulated (its rows are weights' rows), and
the input of a linear layer under ``fused`` (its rows are tokens, and C is what the next product
reads, in its dtype).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import loaded, product


@triton.jit
def accumulate(
    x,
    sketch,
    out,
    entry,
    num_rows,
    num_columns,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Sketch some rows and blocks of one matrix.

    ``x``: (rows, columns). ``sketch``: A / ``entry`` (RANK, BLOCK), which bfloat16 holds exactly.
    ``out``: (rows, blocks, RANK); ADDS: it is added to, otherwise overwritten.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    ranks = tl.arange(0, PADDED)
    places = ranks[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    a = tl.load(sketch + places, mask=(ranks < RANK)[None, :], other=0.0)
    down = rows[:, None].to(tl.int64) * num_columns + tl.arange(0, BLOCK)[None, :]
    start = tl.program_id(1) * GROUP
    for block in range(start, min(start + GROUP, blocks)):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = is_row[:, None] & (columns < num_columns)[None, :]
        c = entry * product(loaded(x + down + block * BLOCK, inside), a)
        at = out + (rows[:, None].to(tl.int64) * blocks + block) * RANK + ranks[None, :]
        is_kept = is_row[:, None] & (ranks < RANK)[None, :]
        if ADDS:
            c += loaded(at, is_kept)
        tl.store(at, c.to(out.dtype.element_ty), mask=is_kept)
