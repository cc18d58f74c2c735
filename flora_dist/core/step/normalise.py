# SPDX-License-Identifier: Apache-2.0
"""What a gradient is divided by: X_ij = G_ij row_i column_j, where R and C are its mean squares.

    factored   1 / sqrt(R_i)    sqrt(mean(R) / C_j)    Adafactor (arXiv 1804.04235)
    rows       1 / sqrt(R_i)    1                      SCALE (arXiv 2506.16659), of outputs
    columns    1                1 / sqrt(C_j)          SCALE, of an embedding's features
    raw        1                1                      what APOLLO sketches

Shape suffixes: E and H matrices, N rows, M columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.views import joined


def kind_of(batch: Batch) -> str:
    """The setting, or "raw" for matrices whose rule takes gradients as they are."""
    is_raw = batch.config.momentum == "apollo" and batch.geometry.rank is not None
    return "raw" if is_raw else batch.config.normalise


def row_scale(normalise: str, row_EN: Tensor) -> Tensor:
    """What rows are multiplied by (E, N)."""
    return torch.ones_like(row_EN) if normalise in {"columns", "raw"} else row_EN.rsqrt()


def column_scale(normalise: str, column_HM: Tensor) -> Tensor:
    """What columns are multiplied by (H, M)."""
    if normalise in {"rows", "raw"}:
        return torch.ones_like(column_HM)
    if normalise == "columns":
        return column_HM.rsqrt()
    # mean(R) = mean(C): both are the moving mean of all of G^2 + eps
    mean_H1 = column_HM.mean(1, keepdim=True)
    # Roots first: their quotient would overflow for a large gradient beside an empty column.
    return mean_H1.sqrt() * column_HM.rsqrt()


def advanced_rows(
    batch: Batch, now: Moment, rows: Sequence[Tensor], square_sum_EN: Tensor
) -> Tensor:
    """The new R (E, N) of some rows, from the old ones and their sums of squares."""
    # R <- b2 R + (1-b2) rowmean(G^2 + eps)
    mean_EN = square_sum_EN / batch.geometry.num_columns + batch.config.eps
    return now.beta2 * joined(rows) + (1 - now.beta2) * mean_EN


def advanced_columns(
    batch: Batch, now: Moment, columns: Sequence[Tensor], square_sum_SM: Tensor
) -> tuple[Tensor, Tensor]:
    """The new C (H, M), and what columns are multiplied by, from the sums over all ranks."""
    # C <- b2 C + (1-b2) colmean(G^2 + eps)
    mean_HM = square_sum_SM[batch.held] / batch.geometry.num_rows + batch.config.eps
    column_HM = now.beta2 * joined(columns) + (1 - now.beta2) * mean_HM
    return column_HM, column_scale(kind_of(batch), column_HM)
