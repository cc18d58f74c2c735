# SPDX-License-Identifier: Apache-2.0
"""Updates whose singular values are made alike, square tile by square tile.

Source: Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), which does so with
whole matrices by a Newton-Schulz iteration of odd quintic polynomials, Y <- a Y + b (Y Y^T) Y +
c (Y Y^T)^2 Y. Ours, and not theirs: tiles of a matrix, each by itself, so that a rank needs nothing
of what others hold; and each keeps its root mean square, so that lr means what it meant.

Three steps do for Muon's five, whose polynomial is the same in each: every step has the one that is
best for the interval which the one before has left (Polar Express, Amsel et al., arXiv 2505.16932),
and a tile is divided by |Y Y^T|^(1/2), which lies nearer to its largest singular value than |Y|.

Shape suffixes: E matrices, N rows, W columns of a piece, T tiles, S side of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flora_dist.core.protocols import Part
from flora_dist.core.state.spec import Geometry

POLYNOMIALS = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
)
"""a, b and c of each step, of the least largest error by Remez's exchange: singular values from
0.003 to 1 end between 0.35 and 1.65; smaller ones grow by 119 at most."""


def orthogonalised(update_ENW: Tensor, side: int) -> Tensor:
    """The update with each tile of ``side`` rows and columns replaced; last ones may be smaller."""
    matrices, rows, columns = update_ENW.shape
    # Beyond the matrix zeros stay zeros: singular values of a part are those of the padded tile.
    high, wide = min(side, rows), min(side, columns)
    beyond = (0, -columns % wide, 0, -rows % high)
    padded = pad(update_ENW, beyond) if any(beyond) else update_ENW
    down, across = padded.shape[1] // high, padded.shape[2] // wide
    tiles_THW = padded.view(matrices, down, high, across, wide).transpose(2, 3).flatten(0, 2)
    size_T11 = tiles_THW.square().mean((1, 2), keepdim=True).sqrt()
    tiny = torch.finfo(update_ENW.dtype).tiny
    alike_THW = newton_schulz(tiles_THW / size_T11.clamp(min=tiny))
    alike_THW *= size_T11 / alike_THW.square().mean((1, 2), keepdim=True).sqrt().clamp(min=tiny)
    back = alike_THW.view(matrices, down, across, high, wide).transpose(2, 3)
    return back.reshape(padded.shape)[:, :rows, :columns].contiguous()


def newton_schulz(tiles_THW: Tensor) -> Tensor:
    """About U V^T of each tile's singular value decomposition U S V^T; entries of about 1 or 0."""
    is_high = tiles_THW.shape[1] > tiles_THW.shape[2]
    y = tiles_THW.mT if is_high else tiles_THW
    tiny = torch.finfo(y.dtype).tiny
    gram = y @ y.mT
    largest_T11 = gram.square().sum((1, 2), keepdim=True).sqrt().clamp(min=tiny)
    y, gram = y / largest_T11.sqrt(), gram / largest_T11
    for step, (a, b, c) in enumerate(POLYNOMIALS):
        gram = gram if step == 0 else y @ y.mT
        # Y <- a Y + (b S + c S^2) Y, S = Y Y^T
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if is_high else y


def check_tiles(part: Part, size: Geometry, side: int | None) -> None:
    """Refuse a part of a matrix that holds pieces of tiles.

    Raises:
        ValueError: naming the parameter and what of it is here.
    """
    if side is None or size.is_vector:
        return
    for tile in part.tiles:
        for what, (first, last), end in (
            ("rows", tile.rows, size.num_rows),
            ("columns", tile.columns, size.num_columns),
        ):
            if first % side or (last % side and last != end):
                raise ValueError(
                    f"orthogonalise={side} needs whole tiles of {side} rows and columns on a rank; "
                    f"of {part.name!r} this one has {what} {first} to {last} of {end}. Pass a side "
                    "that divides what every rank has, or None for its group."
                )
