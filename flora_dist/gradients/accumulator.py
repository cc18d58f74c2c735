# SPDX-License-Identifier: Apache-2.0
"""The sum of one parameter's gradients over micro-batches, kept as sketches.

C <- C + G A^T for every gradient that arrives (Flora, arXiv 2402.03293, Algorithm 1). A is drawn
anew for every step of the optimizer. In few bits it is C <- Q(C + G A^T): the first sketch of a
step at the levels of the normal law, what is added to it by stochastic rounding, since levels are
unbiased for a fresh sketch alone. What follows from shapes alone is found once and kept.

Shape suffixes: E matrices, N rows, K blocks, R rank, or the bytes of a record in few bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional

from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.records import FULL_BITS, Code
from flora_dist.core.sketch.keys import Purpose
from flora_dist.core.sketch.ops import exact_products
from flora_dist.core.sketch.quantise import LEVEL_BITS
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Sketches
from flora_dist.core.step.gradient import Records
from flora_dist.core.step.views import inside, work_limit
from flora_dist.core.tiles import Tile, split
from flora_dist.gradients.lines import Lines
from flora_dist.kernels.records import Draws, add_to_records_, merged_records
from flora_dist.kernels.sketching import RowSketch, add_sketched_

_REPLICA_BITS = 20
"""Of a number that tells draws apart: ranks below, micro-batches above."""
_WIRE = 1 << 40
"""In place of a micro-batch's number: the draw of what travels."""


@dataclass(frozen=True, slots=True)
class StepCounter:
    """The coming step of a parameter; the optimizer may be gone before its model is."""

    optimizer: ref[torch.optim.Optimizer]
    slot: Trainable

    def __call__(self) -> int:
        """Counted from 1."""
        optimizer, slot = self.optimizer(), self.slot
        state = {} if optimizer is None else optimizer.state.get(slot.tensor, {})
        return int(slot.layout.state_of(state, slot.part).get("step", 0)) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """C of the blocks that a tile touches."""

    tile: Tile
    where: tuple[slice, slice, slice] | None
    """Its matrices, rows and blocks among the accumulator's; None where this rank has none."""
    shape: tuple[int, int, int, int]
    """(E, N, K, R)."""

    @property
    def num_lines(self) -> int:
        """Rows of all matrices."""
        return self.shape[0] * self.shape[1]

    @property
    def size(self) -> int:
        """How many numbers."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """How a gradient that covers a part of the tile is added."""

    sizes: tuple[int, int, int]
    """Its E, N and W."""
    padding: tuple[int, int]
    """Columns of zeros that make its rows those of the tile."""
    pieces: tuple[tuple[tuple[slice, slice], tuple[slice, slice]], ...]
    """Matrices and rows of what is multiplied at once, in the gradient and in C; in C they are
    lines that follow each other."""


class Accumulator:
    """Takes full gradients of one tile of a parameter and keeps rank numbers per block of them."""

    def __init__(
        self,
        *,
        name: str,
        geometry: Geometry,
        tile: Tile | None,
        sketches: Sketches,
        dtype: torch.dtype,
        device: torch.device,
        next_step: Callable[[], int],
    ) -> None:
        """Keeps nothing yet.

        Args:
            name: of the parameter, for errors.
            geometry: shape of the whole parameter, blocks, and numbers per block.
            tile: what of it the gradients are of; None if this rank's are empty.
            sketches: A by step, of the tile's matrices.
            dtype: of C: float32, float64 for float64 parameters.
            device: where gradients arrive.
            next_step: the optimizer's coming step of this parameter, from 1.
        """
        assert geometry.rank is not None, f"{name} stays dense"
        self.name, self.tile, self.dtype, self.device = name, tile, dtype, device
        self.rank, self.block = geometry.rank, geometry.block
        is_full = geometry.bits == FULL_BITS
        self.code = None if is_full else Code(bits=geometry.bits, numbers=geometry.rank)
        """How a block's numbers are kept; None: in ``dtype``."""
        self.width = self.rank if self.code is None else self.code.bytes
        self.lines = Lines.of(geometry, tile)
        self.sums_shape = (0, 0, 0, self.width) if tile is None else self.share_of(tile).shape
        """(E, N, K, R) of C; the same before the first gradient."""
        self._sketches, self._next_step = sketches, next_step
        self._cuts: dict[tuple[Tile, torch.device], _Cut] = {}
        self.sums_ENKR: Tensor | None = None
        """C, None before the first gradient."""
        self.step = 0
        """Whose basis C is in; 0 before the first gradient."""
        self.replica = 0
        """This rank's place among those that have gradients of the same elements."""
        self.num_added = 0
        """Gradients in C, each rounded in few bits."""

    def add_(self, gradient: Tensor) -> None:
        """C <- C + G A^T, in the precision of C.

        Args:
            gradient: the tile's elements, shaped like the parameter's local tensor.

        Raises:
            RuntimeError: the optimizer has stepped, or loaded another step, since C was begun.
        """
        if self.tile is None:
            self._begun(gradient.device)
        else:
            self.add_part_(gradient, self.tile)

    def add_part_(self, gradient: Tensor, part: Tile) -> None:
        """The same for a gradient that covers ``part`` of the tile, and is zero elsewhere."""
        assert self.tile is not None, self.name
        sums_ENKR = self._begun(gradient.device)
        device = sums_ENKR.device
        cut = self._cuts.get((part, device))
        if cut is None:
            cut = self._cuts[part, device] = _cut(part, self.tile, work_limit(device))
        gradient_ENW = gradient.reshape(cut.sizes).to(device)
        sketch_ERB = self.sketch(device)
        with exact_products({device.type}):
            for given, kept in cut.pieces:
                rows_ENW = gradient_ENW[given]
                if any(cut.padding):
                    rows_ENW = functional.pad(rows_ENW, cut.padding)
                self._add_rows_(kept, sums_ENKR[kept], rows_ENW, sketch_ERB[kept[0]])
        self.num_added += 1

    def _add_rows_(
        self,
        where: tuple[slice, slice],
        own_ENKR: Tensor,
        rows_ENW: Tensor,
        sketch_ERB: Tensor,
    ) -> None:
        """C <- C + G A^T of some lines of C."""
        assert self.tile is not None, self.name
        sketch = RowSketch(
            matrices_ERB=sketch_ERB,
            first_column=self.tile.columns[0],
            is_hadamard=self._sketches.is_hadamard,
            scale=self._sketches.entry_scale,
        )
        if self.code is None:
            add_sketched_(own_ENKR, rows_ENW, sketch)
            return
        at_levels = self.num_added == 0 and self.code.bits in LEVEL_BITS
        draws = None if at_levels else self._draws(where, own_ENKR.shape[:2].numel())
        add_to_records_(own_ENKR, rows_ENW, sketch, self.code, draws)

    def _draws(self, where: tuple[slice, slice], num_lines: int) -> Draws:
        """Random bits of some lines of C, of this rank's own for each micro-batch."""
        first = where[0].start * self.sums_shape[1] + where[1].start
        number = (self.num_added << _REPLICA_BITS) + self.replica
        key = self._sketches.rounding_key(Purpose.ROUND_GRADIENT, self.step, number)
        return self.lines.draws(key, first, first + num_lines)

    def wire_records(self, share: Share, first: int, last: int, code: Code) -> Tensor:
        """Lines of a share as they travel (lines, K, bytes): as they are kept, if in as few bits.

        Fewer bits than are kept: at the levels of the normal law, which are nearly unbiased where
        what is kept is nearly the sketch itself.
        """
        lines = self.at(share).flatten(0, 1)[first:last]
        if self.code == code:
            return lines
        draws = None
        if code.bits not in LEVEL_BITS:
            assert share.tile is not None
            number = (_WIRE << _REPLICA_BITS) + self.replica
            key = self._sketches.rounding_key(Purpose.ROUND_GRADIENT, self.step, number)
            draws = self.lines.within(share.tile).draws(key, first, last)
        return merged_records([lines], self.code, code, draws, divisor=1.0, dtype=self.dtype)

    def rounded_mean(
        self,
        records: Sequence[Tensor],
        share: Share,
        first: int,
        step: int,
        sent: Code,
        mean: Code,
        divisor: float,
    ) -> Tensor:
        """The mean of some lines of a share (lines, K, bytes), equal on all layouts.

        Args:
            records: those lines of every rank, which are added in this order.
            share: whose lines they are.
            first: which line of it is the first.
            step: that the sketches are of.
            sent: how the records are written.
            mean: how the mean is.
            divisor: of the sum.
        """
        key = self._sketches.rounding_key(Purpose.ROUND_MEAN, step)
        draws = self.lines.within(share.tile).draws(key, first, first + len(records[0]))
        return merged_records(records, sent, mean, draws, divisor=divisor, dtype=self.dtype)

    def add_sketch_(self, sketched: Tensor, step: int) -> None:
        """C <- C + c, where c = G A^T was taken in the basis of ``step``; c is this object's then.

        Not in few bits: what makes sketches itself keeps their numbers.

        Raises:
            RuntimeError: the optimizer has stepped, or loaded another step, since.
        """
        self.check_step(step)
        assert self.code is None, self.name
        sketched_ENKR = sketched.view(self.sums_shape)
        if self.sums_ENKR is None:
            self.sums_ENKR, self.step = sketched_ENKR, step
        else:
            self._begun(sketched.device).add_(sketched_ENKR)

    def share_of(self, tile: Tile) -> Share:
        """Which of C belongs to the blocks that a tile touches."""
        first, last = tile.blocks(self.block)
        where = None
        if self.tile is not None:
            origin, _ = self.tile.blocks(self.block)
            where = (*inside(self.tile, tile), slice(first - origin, last - origin))
        return Share(tile=tile, where=where, shape=(*tile.sizes[:2], last - first, self.width))

    def at(self, share: Share) -> Tensor:
        """A share of C, a view; zeros where this rank had no gradient."""
        if self.sums_ENKR is None or share.where is None:
            return torch.zeros(share.shape, dtype=self._kept_dtype, device=self.device)
        return self.sums_ENKR[share.where]

    def sketches(self, share: Share) -> Tensor | Records:
        """A share of C, to be read by the step."""
        entries_ENKR = self.at(share).contiguous()
        if self.code is None:
            return entries_ENKR
        return Records(octets=entries_ENKR, code=self.code, dtype=self.dtype)

    def sketch(self, device: torch.device) -> Tensor:
        """A (E, R, B) of the coming step, for the tile's matrices."""
        return self._sketches.at(self._next_step(), self.dtype, device)

    @property
    def entry_scale(self) -> float:
        """The scalar in every entry of A: bfloat16 holds A over it exactly."""
        return self._sketches.entry_scale

    @property
    def basis(self) -> tuple[Sketches, int]:
        """Where A comes from, and the coming step."""
        return self._sketches, self._next_step()

    @property
    def next_step(self) -> int:
        """The optimizer's coming step of this parameter."""
        return self._next_step()

    def check_basis(self) -> None:
        """``check_step`` of what is kept."""
        if self.sums_ENKR is not None:
            self.check_step(self.step)

    def check_step(self, step: int) -> None:
        """Refuse sums that the coming step cannot read.

        Raises:
            RuntimeError: the optimizer has loaded another step since ``step``, when C was begun.
        """
        if step != self._next_step():
            raise RuntimeError(
                "sketches of gradients must be in the basis of the coming step; those of "
                f"{self.name!r} are in that of step {step}, the optimizer is at "
                f"{self._next_step()}. Call zero_grad() after load_state_dict(), and no step() "
                "between forward and backward."
            )

    def drop(self) -> None:
        """Forget C, and give its memory back."""
        self.sums_ENKR, self.step, self.num_added = None, 0, 0

    def _begun(self, device: torch.device) -> Tensor:
        self.check_basis()
        if self.sums_ENKR is None:
            self.sums_ENKR = torch.zeros(self.sums_shape, dtype=self._kept_dtype, device=device)
            self.step = self._next_step()
        return self.sums_ENKR

    @property
    def _kept_dtype(self) -> torch.dtype:
        return self.dtype if self.code is None else torch.uint8


def _cut(part: Tile, whole: Tile, max_elements: int) -> _Cut:
    left, right = part.columns[0] - whole.columns[0], whole.columns[1] - part.columns[1]
    return _Cut(
        sizes=part.sizes,
        padding=(left, right),
        pieces=tuple(
            (inside(part, piece), inside(whole, piece))
            for piece in _pieces(part, whole, max_elements)
        ),
    )


def _pieces(part: Tile, whole: Tile, max_elements: int) -> Iterator[Tile]:
    """Pieces of a part; where it leaves rows out each is of one matrix, whose sums are together."""
    if part.rows == whole.rows:
        yield from split(part, max_elements=max_elements)
        return
    for matrix in range(*part.matrices):
        single = replace(part, matrices=(matrix, matrix + 1))
        yield from split(single, max_elements=max_elements)
