# SPDX-License-Identifier: Apache-2.0
"""The norm of all gradients, of what is dense exactly and of what is sketched by its sketches.

|C|^2 = G A^T A G^T is an unbiased estimate of |G|^2, with no factor, since E[A^T A] = I. A block
that several ranks keep is counted where its first element is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.protocols import Reducer
from flora_dist.core.step.gradient import Gradient, SketchedGradient

SMALLEST_NORM = 1e-6
"""Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does."""


def global_norm(slots: Sequence[Trainable], gradients: Sequence[Gradient]) -> Tensor:
    """Norm over all parameters and ranks, (); one small all-reduce per group of ranks."""
    together: dict[Reducer | None, list[Tensor]] = {}
    for slot, gradient in zip(slots, gradients, strict=True):
        squares = together.setdefault(slot.part.reducer, [])
        squares.append(_square_sum(slot, gradient))
    total: Tensor | None = None
    for reducer, squares in together.items():
        dtype = max((square.dtype for square in squares), key=lambda dtype: dtype.itemsize)
        device = squares[0].device
        square_1 = torch.stack([s.to(device=device, dtype=dtype) for s in squares]).sum().view(1)
        if reducer is not None:
            reducer.sum_(square_1)
        total = square_1 if total is None else total + square_1.to(total.device)
    return torch.zeros(()) if total is None else total.sqrt().view(())


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), ()."""
    return (max_norm / (norm + SMALLEST_NORM)).clamp(max=1.0)


def scale_(gradients: Sequence[Gradient], factor: Tensor | float) -> None:
    """Multiply gradients in place, elements and sketches alike."""
    for gradient in gradients:
        if gradient is None:
            continue
        tensors = gradient.tiles if isinstance(gradient, SketchedGradient) else (gradient,)
        for tensor in tensors:
            if isinstance(factor, Tensor) and isinstance(tensor, Tensor):
                tensor.mul_(factor.to(tensor.device))
            else:
                tensor.mul_(factor)


def _square_sum(slot: Trainable, gradient: Gradient) -> Tensor:
    weight = slot.part.weight()
    if gradient is None:
        return torch.zeros((), dtype=torch.float32, device=weight.device)
    if isinstance(gradient, SketchedGradient):
        return _square_sum_of_sketches(slot, gradient)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=wide)
    return norm.square()


def _square_sum_of_sketches(slot: Trainable, gradient: SketchedGradient) -> Tensor:
    sketch_ERB = gradient.sketch_ERB
    total = torch.zeros((), dtype=sketch_ERB.dtype, device=sketch_ERB.device)
    block = sketch_ERB.shape[-1]
    for tile, sketches in zip(slot.part.tiles, gradient.tiles, strict=True):
        first = 1 if tile.columns[0] % block else 0
        for compressed_ENKR in [sketches] if isinstance(sketches, Tensor) else sketches.pieces():
            total = total + compressed_ENKR[:, :, first:].square().sum()
    return total
