# SPDX-License-Identifier: Apache-2.0
"""The sum of one parameter's gradients over micro-batches, kept as sketches.

C <- C + G A^T for every gradient that arrives (Flora, arXiv 2402.03293, Algorithm 1). A is drawn
anew for every step of the optimizer. Shape suffixes: E matrices, N rows, K blocks, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from flora_dist.core.sketch import ops
from flora_dist.core.sketch.ops import exact_products
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Sketches
from flora_dist.core.step.views import as_batches, inside, work_limit
from flora_dist.core.tiles import Tile, split


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
        next_step: Callable[[], int],
    ) -> None:
        """Keeps nothing yet.

        Args:
            name: of the parameter, for errors.
            geometry: shape of the whole parameter, blocks, and numbers per block.
            tile: what of it the gradients are of; None if this rank's are empty.
            sketches: A by step, of the tile's matrices.
            dtype: of C: float32, float64 for float64 parameters.
            next_step: the optimizer's coming step of this parameter, from 1.
        """
        assert geometry.rank is not None, f"{name} stays dense"
        self.name, self.tile, self.dtype = name, tile, dtype
        self.rank, self.block, self._shape = geometry.rank, geometry.block, geometry.shape
        self._sketches, self._next_step = sketches, next_step
        self.sums_ENKR: Tensor | None = None
        """C, None before the first gradient."""
        self.step = 0
        """Whose basis C is in; 0 before the first gradient."""

    @property
    def sums_shape(self) -> tuple[int, int, int, int]:
        """(E, N, K, R) of C; the same before the first gradient."""
        if self.tile is None:
            return (0, 0, 0, self.rank)
        matrices, rows, _ = self.tile.sizes
        first, last = self.tile.blocks(self.block)
        return (matrices, rows, last - first, self.rank)

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
        whole = self.tile
        assert whole is not None, self.name
        sums_ENKR = self._begun(gradient.device)
        gradient_ENW = as_batches(gradient, (part,), shape=self._shape)[0].to(sums_ENKR.device)
        device = sums_ENKR.device
        sketch_ERB = self.sketch(device)
        left, right = part.columns[0] - whole.columns[0], whole.columns[1] - part.columns[1]
        with exact_products({device.type}):
            for piece in _pieces(part, whole, max_elements=work_limit(device)):
                rows_ENW = gradient_ENW[inside(part, piece)].to(self.dtype)
                if left or right:
                    rows_ENW = functional.pad(rows_ENW, (left, right))
                matrices, rows = inside(whole, piece)
                ops.add_compressed_(
                    sums_ENKR[matrices, rows],
                    rows_ENW,
                    sketch_ERB[matrices],
                    first_column=whole.columns[0],
                )

    def add_sketch_(self, sketched: Tensor, step: int) -> None:
        """C <- C + c, where c = G A^T was taken in the basis of ``step``; c is this object's then.

        Raises:
            RuntimeError: the optimizer has stepped, or loaded another step, since.
        """
        if step != self._next_step():
            raise self._stale(step)
        sketched_ENKR = sketched.view(self.sums_shape)
        if self.sums_ENKR is None:
            self.sums_ENKR, self.step = sketched_ENKR, step
        else:
            self._begun(sketched.device).add_(sketched_ENKR)

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
        """Refuse sums that the coming step cannot read.

        Raises:
            RuntimeError: the optimizer has loaded another step since C was begun.
        """
        if self.sums_ENKR is not None and self.step != self._next_step():
            raise self._stale(self.step)

    def drop(self) -> None:
        """Forget C, and give its memory back."""
        self.sums_ENKR, self.step = None, 0

    def _begun(self, device: torch.device) -> Tensor:
        self.check_basis()
        if self.sums_ENKR is None:
            self.sums_ENKR = torch.zeros(self.sums_shape, dtype=self.dtype, device=device)
            self.step = self._next_step()
        return self.sums_ENKR

    def _stale(self, step: int) -> RuntimeError:
        return RuntimeError(
            "sketches of gradients must be in the basis of the coming step; those of "
            f"{self.name!r} are in that of step {step}, the optimizer is at {self._next_step()}. "
            "Call zero_grad() after load_state_dict(), and no step() between forward and backward."
        )


def _pieces(part: Tile, whole: Tile, *, max_elements: int) -> Iterator[Tile]:
    """Pieces of a part; where it leaves rows out each is of one matrix, whose sums are together."""
    if part.rows == whole.rows:
        yield from split(part, max_elements=max_elements)
        return
    for matrix in range(*part.matrices):
        single = replace(part, matrices=(matrix, matrix + 1))
        yield from split(single, max_elements=max_elements)
