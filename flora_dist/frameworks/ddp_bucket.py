# SPDX-License-Identifier: Apache-2.0
"""What stands for the gradients of a DDP bucket in a message, and back.

Shape suffixes: E matrices, N rows, M columns, K blocks, B block, R rank, S numbers of a message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.layouts.replicated import whole
from flora_dist.core.records import Code, mean_bits
from flora_dist.core.sketch import ops
from flora_dist.core.sketch.keys import Purpose, name_key
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Sketches
from flora_dist.core.step.batch import arithmetic_dtype
from flora_dist.core.step.views import as_batches
from flora_dist.gradients.report import GradientRow


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketGradient:
    """One gradient of a bucket."""

    gradient: Tensor
    """A view into the bucket."""
    size: Geometry
    sketch_ERB: Tensor | None
    """None: it travels as it is."""

    @property
    def num_numbers(self) -> int:
        """What stands for it in the message."""
        if self.sketch_ERB is None:
            return self.gradient.numel()
        return _num_numbers(self.size)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """What stands for it in the message, flat."""
        gradient = self.gradient.to(dtype)
        if self.sketch_ERB is None:
            return gradient.reshape(-1)
        (gradient_ENM,) = as_batches(gradient, whole(self.size.shape), shape=self.size.shape)
        return ops.compress(gradient_ENM, self.sketch_ERB).reshape(-1)

    def fill_(self, numbers_S: Tensor) -> None:
        """Overwrite it with what numbers stand for: c A."""
        if self.sketch_ERB is None:
            self.gradient.copy_(numbers_S.view(self.gradient.shape))
            return
        size = self.size
        lines = (size.num_matrices, size.num_rows, size.blocks_per_row)
        gradient_ENM = ops.expand(
            numbers_S.view(*lines, -1), self.sketch_ERB, num_columns=size.num_columns
        )
        self.gradient.copy_(gradient_ENM.reshape(self.gradient.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketParameter:
    """One parameter of the model, and its matrices where it is sketched."""

    name: str
    tensor: Tensor
    size: Geometry
    sketches: Sketches | None

    def row(self, wire_dtype: torch.dtype | None) -> GradientRow:
        """What becomes of its gradient."""
        size, wire = self.size, wire_dtype or arithmetic_dtype(self.tensor.dtype)
        how, sent_bytes = f"dense: {size.dense_because}", self.tensor.numel() * wire.itemsize
        if self.sketches is not None:
            how = f"sketched, {size.rank} per block of {size.block}"
            sent_bytes = _num_numbers(size) * wire.itemsize
        if self.sketches is not None and size.code is not None:
            how = f"{how} in {size.bits} bits"
            blocks = size.num_matrices * size.num_rows * size.blocks_per_row
            mean = Code(bits=mean_bits(size.bits), numbers=size.code.numbers)
            sent_bytes = blocks * (size.code.bytes + mean.bytes)
        return GradientRow(
            name=self.name,
            shape=size.shape,
            how=how,
            is_sketched=self.sketches is not None,
            held_bytes=0,
            sent_bytes=sent_bytes,
        )


def bucket_parameter(
    name: str, tensor: Tensor, size: Geometry, config: FloraConfig
) -> BucketParameter:
    """A parameter as it is cut; ``config``: of its sketches."""
    sketches = None
    if size.rank is not None:
        sketches = Sketches(
            name_key=name_key(name),
            purpose=Purpose.GRADIENT,
            rank=size.rank,
            block=size.block,
            config=config,
            held=(0, size.num_matrices),
            kept=_num_numbers(size),
        )
    return BucketParameter(name=name, tensor=tensor, size=size, sketches=sketches)


def in_place_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient of a bucket with the strides that it was written in: those of its parameter.

    ``GradBucket.gradients()`` takes the memory of each for contiguous, which that of a parameter in
    ``channels_last`` is not: rows and columns would be others than those of the parameter.
    """
    dense = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size != 1 and stride != dense:
            return gradient  # with gaps DDP itself falls back to contiguous
        dense *= size
    return gradient.as_strided(parameter.shape, parameter.stride(), gradient.storage_offset())


def _num_numbers(size: Geometry) -> int:
    assert size.rank is not None
    return size.num_matrices * size.num_rows * size.blocks_per_row * size.rank
