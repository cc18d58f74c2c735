# SPDX-License-Identifier: Apache-2.0
"""What crosses to the device at a step: addresses of gradients, keys and scalars, in one copy.

The copy comes from pinned memory and waits for nothing. It always goes to the same place, so that a
step recorded in a CUDA graph reads the numbers of the step that replays it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.records import FEW_BITS, FULL_BITS
from flora_dist.core.sketch.matrices import entry_scale
from flora_dist.core.sketch.quantise import value_table
from flora_dist.core.state.spec import VECTOR_EPS
from flora_dist.core.step.basis import Basis, SketchedBasis
from flora_dist.core.step.batch import Batch, Moment
from flora_dist.core.step.gradient import Records, SketchedGradient
from flora_dist.kernels.gpu.access import KEEP, LR
from flora_dist.kernels.gpu.tables import is_aligned
from flora_dist.kernels.inputs import keys_of, sketch_numbers

_SCALARS = 14
_RESETS, _MOVES, _STAYS = 2, 1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The gradients of a step, and whatever of it kernels are compiled for."""

    dtype: torch.dtype
    """Of the gradients."""
    is_aligned: bool
    """Whether each begins at a multiple of 16 bytes."""
    addresses: Sequence[int]
    """By member and tile."""
    kept: Sequence[Tensor]
    """What must outlive the addresses."""
    drawn: Drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What gradients that are known by their sketches are multiplied by; nothing, of dense ones."""

    units: Tensor
    """A over its entry scale (matrices, R, B), in bfloat16, which holds it exactly."""
    table: Tensor
    """Values of the codes, of numbers in few bits."""
    bits: int
    """Of each number; 0: gradients are dense."""
    rank: int
    entry: float
    multipliers: Sequence[Tensor | None]
    """Of each tile's numbers, (), by member; none of dense gradients. None: nothing."""


class Inputs:
    """Numbers of a batch's steps, on its device."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        members = len(batch.members)
        tiles = members * len(_offsets(batch))
        self._all = torch.zeros(
            2 * tiles + 2 * members + _SCALARS // 2, dtype=torch.int64, device=batch.device
        )
        self.addresses, self.multipliers, self.keys, scalars = torch.split(
            self._all, [tiles, tiles, 2 * members, _SCALARS // 2]
        )
        """Of gradients, and of what their sketches are multiplied by, by member and tile; keys of
        the rounding bits of each member's weight, then of its momentum."""
        self.scalars = scalars.view(torch.float32)
        """As ``access.py`` numbers them."""

    def write(self, now: Moment) -> Given:
        """Send a step's numbers, behind what the device still does with the last ones."""
        given = self._gradients(now)
        host = torch.empty(
            self._all.shape, dtype=torch.int64, pin_memory=self._batch.device.type == "cuda"
        )
        factors = given.drawn.multipliers or [None for _ in given.addresses]
        whole = [*given.addresses, *(0 if each is None else each.data_ptr() for each in factors)]
        whole += keys_of(self._batch, now) or [0 for _ in range(len(self.keys))]
        host[: len(whole)] = torch.tensor(whole, dtype=torch.int64)
        host[len(whole) :].view(torch.float32).copy_(
            torch.tensor([*self._scalars(now), given.drawn.entry])
        )
        self._all.copy_(host, non_blocking=True)
        self._write_rates(now)
        return given

    def _scalars(self, now: Moment) -> list[float]:
        config, size = self._batch.config, self._batch.geometry
        eps = max(config.eps, VECTOR_EPS) if size.is_vector else config.eps
        entry = 1.0
        if size.rank is not None:
            entry = entry_scale(config.sketch, rank=size.rank)
        beta1, sketch_eps = sketch_numbers(self._batch, now)
        lr, keep = 0.0, 1.0
        if not isinstance(now.lr, Tensor) and not isinstance(now.weight_decay, Tensor):
            lr, keep = now.lr, 1 - now.lr * now.weight_decay
        return [
            now.beta2,
            1 - now.beta2,
            lr,
            keep,
            eps,
            beta1,
            1 - beta1,
            self._batch.gain * now.basis.gain,
            config.clip or 1.0,
            self._batch.sign,
            entry,
            config.growth or 1.0,
            sketch_eps,
        ]

    def _write_rates(self, now: Moment) -> None:
        """Rates that are tensors are never read by the host."""
        if isinstance(now.lr, Tensor) or isinstance(now.weight_decay, Tensor):
            self.scalars[LR.value].copy_(torch.as_tensor(now.lr), non_blocking=True)
            keep = torch.as_tensor(1 - now.lr * now.weight_decay)
            self.scalars[KEEP.value].copy_(keep, non_blocking=True)

    def _gradients(self, now: Moment) -> Given:
        sketched = [each for each in now.gradients if isinstance(each, SketchedGradient)]
        return _sketched(self._batch, sketched) if sketched else _dense(self._batch, now)


def _offsets(batch: Batch) -> list[int]:
    """Where each tile of a member begins among its elements; vectors have one, if only empty."""
    return [offset for offset, _ in batch.sources] or [0]


def _dense(batch: Batch, now: Moment) -> Given:
    """What kernels cannot read as it is becomes fp32 and contiguous; a missing one counts as 0."""
    found = [each for each in now.gradients if isinstance(each, Tensor)]
    if now.is_missing:
        found = [torch.zeros_like(member.weight) for member in batch.members]
    dtype = found[0].dtype
    if any(each.dtype != dtype for each in found) or dtype == torch.float64:
        dtype = torch.float32
    kept = [each.to(dtype).contiguous() for each in found]
    drawn = Drawn(
        units=torch.zeros(1, dtype=torch.bfloat16, device=kept[0].device),
        table=torch.zeros(1, device=kept[0].device),
        bits=0,
        rank=0,
        entry=1.0,
        multipliers=(),
    )
    addresses = [
        each.data_ptr() + offset * each.element_size()
        for each in kept
        for offset in _offsets(batch)
    ]
    return Given(
        dtype=dtype,
        is_aligned=is_aligned(addresses),
        addresses=addresses,
        kept=kept,
        drawn=drawn,
    )


def _sketched(batch: Batch, found: Sequence[SketchedGradient]) -> Given:
    """Sketches as they are kept, and their matrices in the order of the batch's."""
    assert len(found) == len(batch.members), "a step's gradients are all sketched, or none is"
    tiles = [tile for each in found for tile in each.tiles]
    records = [each for each in tiles if isinstance(each, Records)]
    bits = records[0].code.bits if records else FULL_BITS
    kept = [(each.octets if isinstance(each, Records) else each).contiguous() for each in tiles]
    rank = found[0].sketch_ERB.shape[1]
    entry = entry_scale(batch.config.sketch, rank=rank)
    first, last = batch.members[0].matrices
    units = [
        each.sketch_ERB[first - each.first_matrix : last - each.first_matrix] for each in found
    ]
    drawn = Drawn(
        units=(torch.cat(units) / entry).to(torch.bfloat16),
        table=value_table(bits if bits in FEW_BITS else 1, torch.float32, batch.device),
        bits=bits,
        rank=rank,
        entry=entry,
        multipliers=[each.factor if isinstance(each, Records) else None for each in tiles],
    )
    return Given(
        dtype=torch.float32,
        is_aligned=False,
        addresses=[each.data_ptr() for each in kept],
        kept=kept,
        drawn=drawn,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBasis:
    """The momentum's basis as kernels read it."""

    old: Tensor
    """A / entry scale, in bfloat16, which holds it exactly."""
    new: Tensor
    move: Tensor
    """(matrices, R, R), s A_old A_new^T where the window changes."""
    kind: int
    """Whether it does: stays, moves or resets."""


class KernelBases:
    """Bases of a batch, converted when the window changes only."""

    def __init__(self, batch: Batch) -> None:
        self._nothing = torch.zeros(1, device=batch.device)
        self._entry = 1.0
        if batch.geometry.rank is not None:
            self._entry = entry_scale(batch.config.sketch, rank=batch.geometry.rank)
        self._of: Tensor | None = None
        self._new = self._nothing

    def of(self, basis: Basis) -> KernelBasis:
        """What a step reads; no matrices where the momentum is dense, or there is none."""
        nothing = self._nothing
        if not isinstance(basis, SketchedBasis):
            return KernelBasis(old=nothing, new=nothing, move=nothing, kind=_STAYS)
        if basis.new_ERB is not self._of:
            self._of, self._new = basis.new_ERB, self._units(basis.new_ERB)
        if basis.scale is None:
            return KernelBasis(old=self._new, new=self._new, move=nothing, kind=_STAYS)
        kind, move = _RESETS, nothing
        if basis.scale != 0.0:
            kind = _MOVES
            move = basis.scale * torch.bmm(basis.old_ERB, basis.new_ERB.mT)
        return KernelBasis(old=self._units(basis.old_ERB), new=self._new, move=move, kind=kind)

    def _units(self, sketch_ERB: Tensor) -> Tensor:
        return (sketch_ERB / self._entry).to(torch.bfloat16).contiguous()
