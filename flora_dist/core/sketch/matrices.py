# SPDX-License-Identifier: Apache-2.0
"""Sketch matrices A (R, B) of three kinds, drawn from a key, and the constants of their laws.

    c = g A^T      a block g of B elements -> R numbers
    g' = c A       back again; E[A^T A] = I, so g' is an unbiased estimate of g

Legend: B block, R rank of the sketch.

Each matrix is integers, signs or table values that bfloat16 holds exactly, times one scalar that
is computed in float64 and rounded to the dtype. So float32 and float64 differ only by the rounding
of that scalar and of one product.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flora_dist.core.sketch.philox import (
    draws63,
    draws63_of_each,
    grid16,
    grid_signs,
    row_signs_of_each,
)

KINDS = ("hadamard", "gaussian", "rademacher")

_TABLE_SIZE = 1 << 16

# Numbers of one pass over many small matrices: its int64 temporaries stay in a CPU's cache.
_PASS_NUMBERS = 1 << 17


def sketch_matrix(
    kind: str,
    *,
    key: int,
    rank: int,
    block: int,
    columns: tuple[int, int] | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Draws A, or some of its columns: a slice equals the slice of the whole, bit for bit.

    `hadamard`    H[rows] * signs / sqrt(rank): rows without replacement from the Sylvester
                  Hadamard matrix (block, block), one sign per column. A A^T = (block/rank) I.
    `gaussian`    N(0, 1/rank), as 65536 equally likely quantiles (arXiv 2402.03293, section 2.3).
    `rademacher`  +-1/sqrt(rank).

    Args:
        kind: one of `KINDS`.
        key: 64-bit key, see `flora_dist.core.sketch.keys.derive_key`.
        rank: rows of A.
        block: columns of A.
        columns: first column and the column after the last; None is all of them.
        dtype: a floating-point dtype. Below float32 the scalar loses precision, and E[A^T A] = I
            holds only to that precision.
        device: where A is made; its bits do not depend on it.

    Returns:
        (rank, columns) in `dtype`.

    Raises:
        ValueError: for an unknown kind, a rank below 1, and a hadamard sketch whose block is not a
            power of two or is below the rank.

    >>> A = sketch_matrix("hadamard", key=1, rank=2, block=4, dtype=torch.float64, device="cpu")
    >>> torch.allclose(A @ A.T, 2.0 * torch.eye(2, dtype=torch.float64))
    True
    """
    _check(kind, rank=rank, block=block)
    first, stop = (0, block) if columns is None else columns
    assert 0 <= first <= stop <= block, (first, stop, block)
    if kind == "hadamard":
        signs = grid_signs(
            key, rows=(0, 1), columns=(first, stop), num_columns=block, device=device
        )
        rows = _choose_rows(draws63(key, count=block), rank)
        entries = _hadamard_rows(rows.to(device), block, (first, stop)).mul_(signs)
    elif kind == "gaussian":
        table, _ = _gaussian_table(torch.device(device))
        index = grid16(key, rows=(0, rank), columns=(first, stop), num_columns=block, device=device)
        entries = table.index_select(0, index.flatten()).view(index.shape)
    else:
        entries = grid_signs(
            key, rows=(0, rank), columns=(first, stop), num_columns=block, device=device
        )
    return entries.to(dtype).mul_(entry_scale(kind, rank=rank))


def sketch_matrices(
    kind: str,
    *,
    keys: Sequence[int],
    rank: int,
    block: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Draws the A of each key, bit for bit as `sketch_matrix`; those of `hadamard` in one pass.

    A small matrix costs a hundred calls and hardly any work, and a step draws one per parameter.

    Returns:
        (keys, rank, block) in `dtype`.
    """
    _check(kind, rank=rank, block=block)
    drawn = torch.empty(len(keys), rank, block, dtype=dtype, device=device)
    if kind != "hadamard":
        for own, key in zip(drawn, keys, strict=True):
            made = sketch_matrix(kind, key=key, rank=rank, block=block, dtype=dtype, device=device)
            own.copy_(made)
        return drawn
    together = max(1, _PASS_NUMBERS // (rank * block))
    for start in range(0, len(keys), together):
        some = keys[start : start + together]
        rows = _choose_rows(draws63_of_each(some, count=block), rank).to(device)
        signs = row_signs_of_each(some, count=block, device=device)
        entries = _hadamard_rows(rows, block, (0, block)).mul_(signs.unsqueeze(1))
        drawn[start : start + together] = entries
    return drawn.mul_(entry_scale(kind, rank=rank))


def entry_scale(kind: str, *, rank: int) -> float:
    """The scalar in every entry of A: what bfloat16 holds exactly is A over it.

    Args:
        kind: one of `KINDS`.
        rank: rows of A.
    """
    if kind == "gaussian":
        _, variance = _gaussian_table(torch.device("cpu"))
        return 1.0 / math.sqrt(rank * variance)
    return 1.0 / math.sqrt(rank)


def shrink_factor(kind: str, *, rank: int, block: int) -> float:
    """Scale s that minimises E|s g A^T A - g|^2: the least-squares transfer to a new window.

    Source: s = 1 / (1 + relative noise) of a full block; the linear least-squares estimator.

    Args:
        kind: one of `KINDS`.
        rank: rows of A.
        block: columns of A.
    """
    _check(kind, rank=rank, block=block)
    return {
        "hadamard": rank / block,
        "gaussian": rank / (block + rank + 1),
        "rademacher": rank / (block + rank - 1),
    }[kind]


def relative_noise(kind: str, *, rank: int, block: int, width: int | None = None) -> float:
    """E|g A^T A - g|^2 / |g|^2 of one block, the same for every g.

    Source: second moments of A^T A (Wishart for gaussian). Exact for hadamard and rademacher; the
    discrete gaussian has a kurtosis of 2.999, so its noise is 0.001 / rank lower than given.

    Args:
        kind: one of `KINDS`.
        rank: rows of A.
        block: columns of A.
        width: elements of the block; a last block of a row may hold fewer than `block`.
    """
    _check(kind, rank=rank, block=block)
    width = block if width is None else width
    assert 1 <= width <= block, (width, block)
    if kind == "hadamard":
        # Without replacement: the whole matrix (rank = block) has no noise, nor has one column.
        return (block - rank) / rank * (width - 1) / max(1, block - 1)
    return (width + 1 if kind == "gaussian" else width - 1) / rank


def smallest_stable_kappa(kind: str, *, rank: int, block: int, beta1: float) -> int:
    """Smallest window, in steps, whose unscaled transfers keep the momentum's variance bounded.

    A transfer with s = 1 multiplies the second moment by 1 + c, c the relative noise; the steps
    between two transfers multiply it by beta1^(2 kappa). Bounded: beta1^(2 kappa) (1 + c) <= 1.

    Args:
        kind: one of `KINDS`.
        rank: rows of A.
        block: columns of A.
        beta1: decay of the momentum, in [0, 1).

    Returns:
        At least 1.

    Raises:
        ValueError: if beta1 is not in [0, 1).
    """
    if not 0.0 <= beta1 < 1.0:
        raise ValueError(f"beta1 must lie in [0, 1); got beta1={beta1}. 0.9 is usual.")
    if beta1 == 0.0:
        return 1
    growth = math.log1p(relative_noise(kind, rank=rank, block=block))
    return max(1, math.ceil(growth / (2.0 * -math.log(beta1))))


def _check(kind: str, *, rank: int, block: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"sketch must be one of {', '.join(KINDS)}; got {kind!r}. Choose one.")
    if rank < 1 or block < 1:
        raise ValueError(
            f"rank and block of a sketch must be at least 1; got rank={rank}, block={block}. "
            "Raise them, or set rank=None to keep the parameter dense."
        )
    if kind != "hadamard":
        return
    if block & (block - 1):
        raise ValueError(
            f"block of a hadamard sketch must be a power of two; got block={block}. "
            "Use such a block, or sketch='gaussian'."
        )
    if rank > block:
        raise ValueError(
            f"rank of a hadamard sketch must not exceed its block; got rank={rank}, block={block}. "
            "Lower rank, or set rank=None to keep the parameter dense."
        )


def _choose_rows(draws: Tensor, rank: int) -> Tensor:
    """Rows (..., rank) of a Hadamard matrix without replacement, by draws (..., block).

    On the CPU: the few integers of a permutation, sorted once, in the same order anywhere.
    """
    return torch.argsort(draws, dim=-1, stable=True)[..., :rank]


def _hadamard_rows(rows: Tensor, block: int, columns: tuple[int, int]) -> Tensor:
    """These rows (..., columns) of Sylvester's matrix, int8 +-1: H[i, j] = (-1)^popcount(i & j)."""
    parity = rows.unsqueeze(-1) & torch.arange(*columns, dtype=torch.int64, device=rows.device)
    shift = 1
    while shift < block.bit_length():
        shift *= 2
    while shift := shift // 2:
        parity ^= parity >> shift
    return (1 - 2 * (parity & 1)).to(torch.int8)


@functools.cache
def _gaussian_table(device: torch.device) -> tuple[Tensor, float]:
    """Quantiles Phi^-1((i + 1/2) / 65536) as bfloat16 values in float32, and their variance.

    Always computed on the CPU and frozen by a test. The lower half mirrors the upper, so the mean
    is exactly 0; the variance is summed exactly.
    """
    half = torch.arange(_TABLE_SIZE // 2, _TABLE_SIZE, dtype=torch.float64, device="cpu")
    upper = torch.special.ndtri((half + 0.5) / _TABLE_SIZE).to(torch.bfloat16).float()
    table = torch.cat([-upper.flip(0), upper])
    variance = math.fsum(table.double().square().tolist()) / _TABLE_SIZE
    return table.to(device), variance
