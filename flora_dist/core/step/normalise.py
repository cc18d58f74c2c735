# SPDX-License-Identifier: Apache-2.0
"""What a gradient is divided by: X_ij = G_ij row_i column_j, where R and C are its mean squares.

    factored   1 / sqrt(R_i)    sqrt(mean(R) / C_j)    Adafactor (arXiv 1804.04235)
    rows       1 / sqrt(R_i)    1                      SCALE (arXiv 2506.16659), of outputs
    columns    1                1 / sqrt(C_j)          SCALE, of an embedding's features
    racs       1 / sqrt(R_i)    sqrt(K / C_j)          RACS (arXiv 2502.07752): weighed, below
    raw        1                1                      what APOLLO sketches

RACS divides by sqrt(q_i s_j), where q s^T is the best approximation of G^2 of rank one: from q = 1,
five times s = colsum(q G^2) / |q|^2 and q = rowsum(s G^2) / |s|^2, averaged over steps. Here each
step takes one turn of both, from the averages of the step before:

    R_i = sum_j w_j G_ij^2 / sum_j w_j, w = old C    C_j = sum_i v_i G_ij^2 / sum_i v_i, v = old R

averaged likewise, and K = sum_j w_j C_j / sum_j w_j, the mean of all. Where they come to rest R and
C are q and s but for their size, and R C / K is q s. Weights of one make it Adafactor: so at the
first step. No weight is below a hundredth. Old averages are known before this gradient is, so that
one look and one message are enough, as for Adafactor; q from the new s, as in the paper, would need
one more of each.

Shape suffixes: E and H matrices, N rows, M columns, W columns of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.pieces import Piece
from flora_dist.core.step.views import joined

LEAST_WEIGHT = 1e-2
"""Of a row or column. Where no gradient ties some rows and columns to the others, the best
approximation of rank one leaves the smaller part out, and its updates would grow without bound."""
Weights = Tensor | None
"""None: all alike."""


# Torch cuts a longer sum that gives one number among threads, of which the holders of a cut row may
# have different numbers.
_SUMMED_AT_ONCE = 1 << 14


def row_totals(values: Tensor) -> Tensor:
    """Sums over the last dim in float64; a row's bits do not depend on others, nor on threads."""
    parts = torch.split(values.double(), _SUMMED_AT_ONCE, dim=-1)
    totals = parts[0].sum(-1)
    for part in parts[1:]:
        totals += part.sum(-1)
    return totals


def _row_means(values_HM: Tensor) -> Tensor:
    means_H = row_totals(values_HM) / values_HM.shape[1]
    return means_H.to(values_HM.dtype).unsqueeze(1)


def kind_of(batch: Batch) -> str:
    """The setting, or "raw" for matrices whose rule takes gradients as they are."""
    is_raw = batch.config.momentum == "apollo" and batch.geometry.rank is not None
    return "raw" if is_raw else batch.config.normalise


def row_scale(normalise: str, row_EN: Tensor) -> Tensor:
    """What rows are multiplied by (E, N)."""
    return torch.ones_like(row_EN) if normalise in {"columns", "raw"} else row_EN.rsqrt()


def column_scale(normalise: str, column_HM: Tensor, weight_HM: Weights) -> Tensor:
    """What columns are multiplied by (H, M); ``weight_HM``: what they weighed in means of rows."""
    if normalise in {"rows", "raw"}:
        return torch.ones_like(column_HM)
    if normalise == "columns":
        return column_HM.rsqrt()
    # mean(R) = mean(C): both are the moving mean of all of G^2 + eps; weighed, K
    if weight_HM is None:
        mean_H1 = column_HM.mean(1, keepdim=True)
    else:
        mean_H1 = _row_means(column_HM * weight_HM)
    # Roots first: their quotient would overflow for a large gradient beside an empty column.
    return mean_H1.sqrt() * column_HM.rsqrt()


def column_weights(batch: Batch, now: Moment, columns: Sequence[Tensor]) -> Weights:
    """What columns weigh in sums of a row's squares (H, M), of mean 1; ``columns``: the old C."""
    if kind_of(batch) != "racs":
        return None
    column_HM = joined(columns)
    if now.step == 1:
        return torch.ones_like(column_HM)
    weight_HM = (column_HM / _row_means(column_HM)).clamp(min=LEAST_WEIGHT)
    return weight_HM / _row_means(weight_HM)


def row_weights(batch: Batch, now: Moment, piece: Piece, columns: Sequence[Tensor]) -> Weights:
    """What the rows of a piece weigh in sums of a column's squares (E, N).

    Over the mean of C, whole on every rank, so that they are near 1 and one measure holds for all.
    """
    if kind_of(batch) != "racs":
        return None
    row_EN = joined(piece.rows)
    if now.step == 1:
        return torch.ones_like(row_EN)
    mean_E1 = _row_means(joined(columns)[piece.place.matrices])
    return (row_EN / mean_E1).clamp(min=LEAST_WEIGHT)


def row_sums(square_ENW: Tensor, piece: Piece, weight_HM: Weights) -> Tensor:
    """Sums of squares (E, N) over the columns of a piece, weighed."""
    if weight_HM is None:
        return square_ENW.sum(2)
    weight_EW = weight_HM[piece.place.matrices, slice(*piece.tile.columns)]
    return (square_ENW @ weight_EW.unsqueeze(2)).squeeze(2)


def add_column_sums_(
    terms: Terms,
    piece: Piece,
    square_ENW: Tensor,
    weight_EN: Weights,
    scale_EN: Tensor | None,
) -> None:
    """Add what a piece's rows make of message 1's sums by columns.

    ``scale_EN``: what rows are multiplied by; None where it is not known before that message.
    """
    summed, columns = piece.summed, slice(*piece.tile.columns)
    if weight_EN is not None and columns.start == 0:  # of a cut row, once
        terms["row_weights"][summed] += weight_EN.sum(1)
    if scale_EN is not None and "squares" in terms:
        # columns: sum_i G^2; squares: sum_i G^2 / R_i: one pass over the squares for both
        own_EN = torch.ones_like(scale_EN) if weight_EN is None else weight_EN
        sums_E2M = torch.stack([own_EN, scale_EN.square()], dim=1) @ square_ENW
        terms["columns"][summed] += sums_E2M[:, 0]
        terms["squares"][summed] += sums_E2M[:, 1]
    elif weight_EN is None:
        terms["columns"][summed, columns] += square_ENW.sum(1)
    else:
        terms["columns"][summed, columns] += (weight_EN.unsqueeze(1) @ square_ENW).squeeze(1)


def advanced_rows(
    batch: Batch, now: Moment, rows: Sequence[Tensor], square_sum_EN: Tensor
) -> Tensor:
    """The new R (E, N) of some rows, from the old ones and their weighed sums of squares."""
    # R <- b2 R + (1-b2) rowmean(G^2 + eps)
    mean_EN = square_sum_EN / batch.geometry.num_columns + batch.config.eps
    return now.beta2 * joined(rows) + (1 - now.beta2) * mean_EN


def advanced_columns(
    batch: Batch, now: Moment, columns: Sequence[Tensor], totals: Terms
) -> tuple[Tensor, Tensor]:
    """The new C (H, M), and what columns are multiplied by, from the sums over all ranks."""
    rows: Tensor | int = batch.geometry.num_rows
    if "row_weights" in totals:
        rows = totals["row_weights"][batch.held].unsqueeze(1)
    # C <- b2 C + (1-b2) colmean(G^2 + eps)
    mean_HM = totals["columns"][batch.held] / rows + batch.config.eps
    column_HM = now.beta2 * joined(columns) + (1 - now.beta2) * mean_HM
    weight_HM = column_weights(batch, now, columns)
    return column_HM, column_scale(kind_of(batch), column_HM, weight_HM)
