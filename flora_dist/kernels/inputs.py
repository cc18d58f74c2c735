# SPDX-License-Identifier: Apache-2.0
"""What crosses to the kernels at a step: numbers, addresses of gradients, the basis, keys.

Shape suffixes: E matrices, B block, R rank, P the rank up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flora_dist.core.sketch.keys import Purpose, derive_key
from flora_dist.core.state.spec import VECTOR_EPS
from flora_dist.core.step.basis import Basis, SketchedBasis
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.gradient import Records, SketchedGradient
from flora_dist.core.step.momentum_rules import ApolloRule, SubspaceAdamRule, rule_of
from flora_dist.core.step.rates import corrected
from flora_dist.kernels.records import table_of
from flora_dist.kernels.tables import DTYPES

_MISSING, _SKETCHED, _RECORDS = -1, 3, 4
_STAYS, _MOVES, _RESETS = 0, 1, 2
_LANES = 8
"""``struct Basis``: R is padded to a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The gradients of a step."""

    numbers: list[int]
    """Kind, block, rank, addresses by member (and tile), addresses of sketch matrices; records have
    bits and a table before the addresses, and factors behind them."""
    kept: Sequence[object]
    """What must outlive the addresses."""


def numbers_of(batch: Batch, now: Moment) -> list[float]:
    """``struct Now``."""
    config, size = batch.config, batch.geometry
    lr, decay = float(now.lr), float(now.weight_decay)
    eps = max(config.eps, VECTOR_EPS) if size.is_vector else config.eps
    beta1, sketch_eps = sketch_numbers(batch, now)
    clip = 0.0 if config.clip is None else config.clip
    return [
        now.beta2,
        1 - now.beta2,
        lr,
        1 - lr * decay,
        eps,
        beta1,
        batch.gain * now.basis.gain,
        clip,
        batch.sign,
        0.0 if config.growth is None else config.growth,
        sketch_eps,
    ]


def sketch_numbers(batch: Batch, now: Moment) -> tuple[float, float]:
    """Decay of the momentum at this step, and eps of second moments of sketched numbers, if any."""
    config, size = batch.config, batch.geometry
    if size.rank is None or size.moments == 1:
        return config.beta1, 0.0
    rule = rule_of(config, size)
    assert isinstance(rule, SubspaceAdamRule | ApolloRule), "who else keeps two"
    return corrected(config.beta1, now.step), rule.eps


def gradients_of(now: Moment) -> Given:
    """Addresses of gradients; what the kernels cannot read is made fp32 and contiguous first."""
    gradients = now.gradients
    dense = [each for each in gradients if isinstance(each, Tensor)]
    if dense:
        dtypes = {each.dtype for each in dense}
        dtype = dtypes.pop()
        if dtypes or dtype not in DTYPES:
            dtype = torch.float32
            dense = [each.to(dtype) for each in dense]
        if not all(each.is_contiguous() for each in dense):
            dense = [each.contiguous() for each in dense]
        numbers = [DTYPES[dtype], 0, 0]
        numbers.extend([each.data_ptr() for each in dense])
        return Given(numbers=numbers, kept=dense)
    sketched = [each for each in gradients if isinstance(each, SketchedGradient)]
    if not sketched:
        return Given(numbers=[_MISSING, 0, 0, *(0 for _ in gradients)], kept=())
    return _sketched(sketched)


def _sketched(gradients: Sequence[SketchedGradient]) -> Given:
    rank, block = gradients[0].sketch_ERB.shape[1:]
    tiles = [tile for each in gradients for tile in each.tiles]
    matrices = [each.sketch_ERB.contiguous() for each in gradients]
    bytes_of_one = rank * block * 4
    starts = [
        # As if it began with the parameter's first matrix.
        sketch.data_ptr() - each.first_matrix * bytes_of_one
        for each, sketch in zip(gradients, matrices, strict=True)
    ]
    records = [tile for tile in tiles if isinstance(tile, Records)]
    if records:
        assert len(records) == len(tiles), "a step's sketches are all in few bits, or none is"
        given = _of_records(records)
        numbers = [_RECORDS, block, rank, *given.numbers, *starts]
        return Given(numbers=numbers, kept=(given, matrices))
    sums = [tile.contiguous() for tile in tiles if isinstance(tile, Tensor)]
    numbers = [_SKETCHED, block, rank, *(each.data_ptr() for each in sums), *starts]
    return Given(numbers=numbers, kept=(sums, matrices))


def _of_records(records: Sequence[Records]) -> Given:
    """Bits, table, addresses and those of factors."""
    (code,) = {each.code for each in records}
    table = table_of(code.bits)
    octets = [each.octets.contiguous() for each in records]
    factors = [0 if each.factor is None else each.factor.data_ptr() for each in records]
    numbers = [code.bits, 0 if table is None else table.data_ptr()]
    numbers += [*(each.data_ptr() for each in octets), *factors]
    return Given(numbers=numbers, kept=(octets, table, records))


class Bases:
    """The momentum's basis as the kernels read it, made anew with the window only."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._columns_EBP: Tensor | None = None

    def of(self, basis: Basis) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A_old, A_new, and A_new transposed."""
        if not isinstance(basis, SketchedBasis):
            return None, None, None
        if basis.new_ERB is not self._of:
            self._of = basis.new_ERB
            self._columns_EBP = padded(basis.new_ERB.mT)
        return basis.old_ERB, basis.new_ERB, self._columns_EBP


def move_of(basis: Basis) -> tuple[Tensor | None, int]:
    """S A_old A_new^T (E, R, P) where the window changes, and whether it does."""
    if not isinstance(basis, SketchedBasis) or basis.scale is None:
        return None, _STAYS
    if basis.scale == 0.0:
        return None, _RESETS
    return padded(basis.scale * torch.bmm(basis.old_ERB, basis.new_ERB.mT)), _MOVES


def padded(values: Tensor) -> Tensor:
    """The last dim up to a multiple of 8, with zeros; contiguous."""
    return pad(values, (0, -values.shape[-1] % _LANES)).contiguous()


def keys_of(batch: Batch, now: Moment) -> list[int]:
    """Keys of the rounding bits by member, of weights and then of momenta; none if nothing asks."""
    first = batch.members[0]
    momentum = first.local.get("momentum")
    rounds_weight = first.weight.dtype != torch.float32
    rounds_momentum = momentum is not None and momentum.dtype != torch.float32
    # Records are rounded with bits, whatever is said of bfloat16.
    has_records = momentum is not None and momentum.dtype == torch.uint8
    if not batch.config.stochastic_rounding:
        rounds_weight, rounds_momentum = False, has_records
    if not (rounds_weight or rounds_momentum):
        return []
    nothing = [0] * len(batch.members)
    weights = _keys(batch, now, Purpose.ROUND_WEIGHT) if rounds_weight else nothing
    momenta = _keys(batch, now, Purpose.ROUND_MOMENTUM) if rounds_momentum else nothing
    return [*weights, *momenta]


def _keys(batch: Batch, now: Moment, purpose: Purpose) -> list[int]:
    keys = [
        derive_key(seed=batch.config.seed, name_key=each.name_key, purpose=purpose, window=now.step)
        for each in batch.members
    ]
    return [key - (1 << 64) if key >> 63 else key for key in keys]
