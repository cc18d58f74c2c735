# SPDX-License-Identifier: Apache-2.0
"""Writes results into weights and momentum of any dtype, rounding low precision stochastically."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.sketch.keys import Purpose, derive_key
from flora_dist.sketch.philox import grid16
from flora_dist.sketch.rounding import round_stochastic
from flora_dist.tiles import Interval, Tile

_LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Rounds for one parameter at one step.

    Random bits are a function of the element's global place, so replicas and holders of one cut
    block write the same bits.
    """

    seed: int
    name_key: int
    step: int
    num_rows: int
    """N: rows of all matrices are numbered through, so one grid of bits serves a batch."""
    stochastic: bool

    def write_(
        self,
        target_ENW: Tensor,
        value_ENW: Tensor,
        *,
        purpose: Purpose,
        tile: Tile,
        columns: Interval,
        num_columns: int,
    ) -> None:
        """Copy ``value`` to ``target``, whose last dim is ``columns`` of ``num_columns``."""
        if target_ENW.dtype not in _LOW_PRECISION or not self.stochastic:
            target_ENW.copy_(value_ENW)
            return
        key = derive_key(seed=self.seed, name_key=self.name_key, purpose=purpose, window=self.step)
        bits_ENW = torch.cat(
            [
                grid16(
                    key,
                    rows=lines,
                    columns=columns,
                    num_columns=num_columns,
                    device=target_ENW.device,
                )
                for lines in tile.lines(self.num_rows)
            ]
        ).view(target_ENW.shape)
        # The bits are made for fp32; what a float64 parameter loses on the way is far below them.
        rounded_ENW = round_stochastic(value_ENW.float(), target_ENW.dtype, bits_ENW)
        target_ENW.copy_(rounded_ENW)
