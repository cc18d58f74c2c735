# SPDX-License-Identifier: Apache-2.0
"""Where a step meets memory: it reads gradients, and writes weights and momentum of any dtype.

    W <- (1 - lr wd) W - rate U

Low precision is rounded stochastically. Shape suffixes: E matrices, H matrices of a batch that are
here, N rows, W columns, K blocks, B block, R rank of the sketch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.sketch import ops
from flora_dist.core.sketch.keys import Purpose, derive_key
from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.quantise import read_records, round_records
from flora_dist.core.sketch.rounding import round_stochastic
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.gradient import SketchedGradient
from flora_dist.core.step.pieces import Piece
from flora_dist.core.step.views import joined
from flora_dist.core.tiles import Interval, Tile

_LOW_PRECISION = (torch.bfloat16, torch.float16)
# Floor of RMS(weight) under scale_parameter (Adafactor, arXiv 1804.04235, section 8).
SMALLEST_SCALE = 1e-3
# Largest and one over the least factor of a relative lr; row "default, lr relative".
MOST_GROWN = 2.0
LEAST_NORM = 1e-4
"""Of an update, below which it was zero but for rounding: from it none could ever grow again."""


def read_gradient(batch: Batch, now: Moment, piece: Piece) -> Tensor:
    """The gradient of a piece (E, N, W), contiguous, in the arithmetic's dtype, times the sign.

    It may share the gradient's memory: nothing in it may be changed.
    """
    found = now.gradients[piece.members]
    dense = [each for each in found if isinstance(each, Tensor)]
    sketched = [each for each in found if isinstance(each, SketchedGradient)]
    if sketched:
        elements_ENW = _expand(sketched, piece)
    elif not dense:
        elements_ENW = torch.zeros(piece.sizes, dtype=batch.dtype, device=batch.device)
    elif len(dense) > 1:
        elements_ENW = torch.stack(dense).view(piece.sizes)
    else:
        elements_ENW = _window(batch, dense[0], piece)
    elements_ENW = elements_ENW.to(batch.dtype).contiguous()
    return elements_ENW if batch.sign > 0 else -elements_ENW


def read_momentum(batch: Batch, piece: Piece) -> Tensor:
    """The momentum of a piece, in the arithmetic's dtype."""
    stored, code = joined(piece.momenta), batch.geometry.code
    return stored.to(batch.dtype) if code is None else read_records(stored, code, batch.dtype)


# Rows first: a sum over a whole piece would be cut among threads where it is one number, and not
# where there are several, so that bits would depend on what is stepped together.


def sum_of(x_ENW: Tensor) -> Tensor:
    """Sum (E,) over the rows and columns of each matrix."""
    return x_ENW.sum(2).sum(1)


def square_sum(x_ENW: Tensor) -> Tensor:
    """Sum of squares (E,), likewise."""
    return sum_of(x_ENW.square())


def _window(batch: Batch, gradient: Tensor, piece: Piece) -> Tensor:
    """A piece's rows of a whole gradient, which has the layout of the weight."""
    offset, sizes = batch.sources[piece.source]
    if len(batch.sources) > 1:  # tiles follow each other in a flat tensor
        gradient = gradient.reshape(-1)[offset : offset + math.prod(sizes)]
    return gradient.reshape(sizes)[piece.window]


def _expand(found: Sequence[SketchedGradient], piece: Piece) -> Tensor:
    # G' = C A
    first, last = piece.tile.matrices
    compressed = [each.tiles[piece.source][piece.window] for each in found]
    sketches = [
        each.sketch_ERB[first - each.first_matrix : last - each.first_matrix] for each in found
    ]
    return ops.expand(
        joined(compressed),
        joined(sketches),
        num_columns=piece.sizes[2],
        first_column=piece.tile.columns[0],
    )


def clip_factor(square_sum_H: Tensor, batch: Batch) -> Tensor:
    """1 / max(1, RMS / clip) of each matrix (H,), without a copy to the host."""
    if batch.config.clip is None:
        return torch.ones_like(square_sum_H)
    # Sums over shards can round a true zero to just below it.
    rms_H = (square_sum_H.clamp(min=0) / batch.elements_per_matrix).sqrt()
    return 1 / (rms_H / batch.config.clip).clamp(min=1)


def growth_factor(square_sum_H: Tensor, last_H: Tensor, growth: float) -> tuple[Tensor, Tensor]:
    """min(1, growth last / norm) of each matrix (H,), and the norm that this leaves.

    Source: the norm-growth limiter of Fira (arXiv 2410.01623, section 4.3). A matrix whose last
    update was zero but for rounding, as before the first, is not limited.
    """
    norm_H = square_sum_H.clamp(min=0).sqrt()
    bound_H = torch.where(last_H > LEAST_NORM, growth * last_H, norm_H)
    return (bound_H / norm_H).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1), norm_H.minimum(bound_H)


def rate_of(now: Moment, weight_square_sum_H: Tensor | None, batch: Batch) -> float | Tensor:
    """The step size: lr, under scale_parameter times max(1e-3, RMS(weight)) of each matrix (H,)."""
    if weight_square_sum_H is None:
        return now.lr
    return now.lr * _size_of(weight_square_sum_H, batch)


def relative_rate_of(
    now: Moment, weight_square_sum_H: Tensor, start_H: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The step size lr RMS(weight) / RMS(weight at the first step) (H,), and the latter.

    The quotient stays between 1/2 and 2: without a bound weights and steps would make each other
    larger. Sizes are at least 1e-3, and a matrix that started below keeps lr: its size says
    nothing. ``start_H`` is 0 before the first step.
    """
    size_H = _size_of(weight_square_sum_H, batch)
    start_H = torch.where(start_H > 0, start_H, size_H)
    grown_H = (size_H / start_H).clamp(1 / MOST_GROWN, MOST_GROWN)
    return now.lr * torch.where(start_H > SMALLEST_SCALE, grown_H, 1.0), start_H


def _size_of(weight_square_sum_H: Tensor, batch: Batch) -> Tensor:
    rms_H = (weight_square_sum_H / batch.elements_per_matrix).sqrt()
    return rms_H.clamp(min=SMALLEST_SCALE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Writes what one step of a batch has made.

    Targets are tensors of some members, of the same rows and columns of each; values hold these
    members one after the other along their first dim.
    """

    batch: Batch
    now: Moment

    def step_weights_(
        self,
        targets: Sequence[Tensor],
        update_ENW: Tensor,
        rate: float | Tensor,
        *,
        members: slice,
        tile: Tile,
    ) -> None:
        """W <- (1 - lr wd) W - rate U; overwrites U.

        Args:
            targets: weights (E, N, W) of each member.
            update_ENW: U.
            rate: a number, or one per matrix (E,).
            members: which these are.
            tile: what of each member it is.
        """
        now, decay = self.now, self.now.weight_decay
        keep = 1 - now.lr * decay if isinstance(decay, Tensor) or decay != 0 else None
        alpha = rate if isinstance(rate, float | int) else 1.0
        if isinstance(rate, Tensor):
            update_ENW.mul_(rate.view(-1, 1, 1) if rate.ndim else rate)
        if targets[0].dtype == self.batch.dtype:
            if keep is not None:
                for target in targets:
                    target.mul_(keep)
            updates = torch.split(update_ENW, targets[0].shape[0])
            torch._foreach_sub_(list(targets), list(updates), alpha=alpha)
            return
        weight_ENW = joined(targets).to(self.batch.dtype)
        if keep is not None:
            weight_ENW *= keep
        weight_ENW.sub_(update_ENW, alpha=alpha)
        self._round_to_(
            targets,
            weight_ENW,
            purpose=Purpose.ROUND_WEIGHT,
            members=members,
            tile=tile,
            columns=tile.columns,
            num_columns=self.batch.geometry.num_columns,
        )

    def write_momentum_(
        self, targets: Sequence[Tensor], value: Tensor, *, members: slice, tile: Tile
    ) -> None:
        """M <- value, in the dtype that it is kept in: (E, N, K, R), or (E, N, W) where dense."""
        if targets[0].dtype == value.dtype:
            copy_to_(targets, value)
            return
        size = self.batch.geometry
        columns, num_columns = tile.columns, size.num_columns
        if size.rank is not None:  # numbers of a row in order: so many per block
            first, last = tile.blocks(size.block)
            columns = (first * size.numbers, last * size.numbers)
            num_columns = size.blocks_per_row * size.numbers
        if size.code is not None:
            drawn = self._bits(
                Purpose.ROUND_MOMENTUM, members, tile, columns, num_columns, value.device
            )
            copy_to_(targets, round_records(value, drawn.view(value.shape), size.code))
            return
        self._round_to_(
            [target.flatten(2) for target in targets],
            value.flatten(2),
            purpose=Purpose.ROUND_MOMENTUM,
            members=members,
            tile=tile,
            columns=columns,
            num_columns=num_columns,
        )

    def _round_to_(
        self,
        targets: Sequence[Tensor],
        value_ENW: Tensor,
        *,
        purpose: Purpose,
        members: slice,
        tile: Tile,
        columns: Interval,
        num_columns: int,
    ) -> None:
        """Round to the targets' dtype; the last dim is ``columns`` of ``num_columns``."""
        dtype, config = targets[0].dtype, self.batch.config
        if dtype in _LOW_PRECISION and config.stochastic_rounding:
            bits = self._bits(purpose, members, tile, columns, num_columns, value_ENW.device)
            # The bits are made for fp32; what float64 loses on the way is far below them.
            value_ENW = round_stochastic(value_ENW.float(), dtype, bits.view(value_ENW.shape))
        copy_to_(targets, value_ENW)

    def _bits(
        self,
        purpose: Purpose,
        members: slice,
        tile: Tile,
        columns: Interval,
        num_columns: int,
        device: torch.device,
    ) -> Tensor:
        """Random bits of some members, one after the other along the first dim.

        They are a function of the element's global place, so replicas and holders of one cut block
        write the same. Rows of all matrices are numbered through.
        """
        seed, step = self.batch.config.seed, self.now.step
        lines = list(tile.lines(self.batch.geometry.num_rows))
        return torch.cat(
            [
                grid16(
                    derive_key(seed=seed, name_key=member.name_key, purpose=purpose, window=step),
                    rows=rows,
                    columns=columns,
                    num_columns=num_columns,
                    device=device,
                )
                for member in self.batch.members[members]
                for rows in lines
            ]
        )


def copy_to_(targets: Sequence[Tensor], value: Tensor) -> None:
    """Copy what stands one after the other along the first dim to each of ``targets``."""
    if len(targets) == 1:
        targets[0].copy_(value)
    else:
        # By sizes: a rank may hold no rows of any, which one size cannot say.
        sizes = [target.shape[0] for target in targets]
        torch._foreach_copy_(list(targets), list(torch.split(value, sizes)))
