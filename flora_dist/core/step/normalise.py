# SPDX-License-Identifier: Apache-2.0
"""What a gradient is divided by: X_ij = G_ij row_i column_j, where R and C are its mean squares.

    factored   1 / sqrt(R_i)    sqrt(mean(R) / C_j)    Adafactor (arXiv 1804.04235)
    rows       1 / sqrt(R_i)    1                      SCALE (arXiv 2506.16659), of outputs
    columns    1                1 / sqrt(C_j)          SCALE, of an embedding's features

Shape suffixes: E and H matrices, N rows, M columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_scale(normalise: str, row_EN: Tensor) -> Tensor:
    """What rows are multiplied by (E, N)."""
    return torch.ones_like(row_EN) if normalise == "columns" else row_EN.rsqrt()


def column_scale(normalise: str, column_HM: Tensor) -> Tensor:
    """What columns are multiplied by (H, M)."""
    if normalise == "rows":
        return torch.ones_like(column_HM)
    if normalise == "columns":
        return column_HM.rsqrt()
    # mean(R) = mean(C): both are the moving mean of all of G^2 + eps
    mean_H1 = column_HM.mean(1, keepdim=True)
    # Roots first: their quotient would overflow for a large gradient beside an empty column.
    return mean_H1.sqrt() * column_HM.rsqrt()
