# SPDX-License-Identifier: Apache-2.0
"""The end of a step: W <- (1 - lr wd) W - rate U, and the new momentum, in whatever dtype.

Low precision is rounded stochastically. Shape suffixes: E matrices, N rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.optim.batch import Batch, Moment
from flora_dist.sketch.keys import Purpose, derive_key
from flora_dist.sketch.philox import grid16
from flora_dist.sketch.rounding import round_stochastic
from flora_dist.tiles import Interval, Tile

_LOW_PRECISION = (torch.bfloat16, torch.float16)


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
        if size.rank is not None:  # numbers of a row in order: rank of them per block
            first, last = tile.blocks(size.block)
            columns = (first * size.rank, last * size.rank)
            num_columns = size.blocks_per_row * size.rank
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
        """Round to the targets' dtype; the last dim is ``columns`` of ``num_columns``.

        Random bits are a function of the element's global place, so replicas and holders of one
        cut block write the same bits. Rows of all matrices are numbered through.
        """
        dtype, config = targets[0].dtype, self.batch.config
        if dtype in _LOW_PRECISION and config.stochastic_rounding:
            lines = list(tile.lines(self.batch.geometry.num_rows))
            bits = torch.cat(
                [
                    grid16(
                        derive_key(
                            seed=config.seed,
                            name_key=member.name_key,
                            purpose=purpose,
                            window=self.now.step,
                        ),
                        rows=rows,
                        columns=columns,
                        num_columns=num_columns,
                        device=value_ENW.device,
                    )
                    for member in self.batch.members[members]
                    for rows in lines
                ]
            )
            # The bits are made for fp32; what float64 loses on the way is far below them.
            value_ENW = round_stochastic(value_ENW.float(), dtype, bits.view(value_ENW.shape))
        copy_to_(targets, value_ENW)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """What stands one after the other along the first dim; a single tensor itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def copy_to_(targets: Sequence[Tensor], value: Tensor) -> None:
    """Copy what stands one after the other along the first dim to each of ``targets``."""
    if len(targets) == 1:
        targets[0].copy_(value)
    else:
        torch._foreach_copy_(list(targets), list(torch.split(value, targets[0].shape[0])))
