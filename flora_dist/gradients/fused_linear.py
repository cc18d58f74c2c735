# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight gradient is a sketch from the start: (dY^T X) A^T = dY^T (X A^T).

The sketch leaves autograd as the gradient of a leaf of zeros, the carrier, as if the layer were

    y = X W^T + (X A^T) carrier^T + b

So layers that share a weight, micro-batches, checkpointing and torch.compile are autograd's own
business, and backward has no side effects. Blocks lie along the columns of the weight: inputs of
nn.Linear, whose X A^T is kept instead of X; outputs of Conv1D, whose dY A^T is made in backward.

A is given as what bfloat16 holds exactly, and its scale apart, so that products in low precision
round X and dY alone. Shape suffixes: T tokens (all leading dims), N rows of the weight, M columns,
S sketch of a row (K blocks times R numbers), B block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flora_dist.core.sketch import ops


class SketchedLinear(torch.autograd.Function):
    """y = X W^T + b of nn.Linear, W (N, M): X (..., M) in, (..., N) out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_NM: Tensor,
        bias_N: Tensor | None,
        carrier_NKR: Tensor,
        unit_RB: Tensor,
        scale: float,
    ) -> Tensor:
        """Keep X A^T, and the weight itself, whose memory FSDP2 and ZeRO free and fill again."""
        x_TM = x.reshape(-1, x.shape[-1])
        # A is not read again, but autograd then notices if it has moved on by the backward.
        ctx.save_for_backward(_compress(x_TM, unit_RB), weight_NM, unit_RB)
        ctx.scale, ctx.like = scale, (carrier_NKR.shape, carrier_NKR.dtype)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        bias = None if bias_N is None else bias_N.to(x.dtype)
        return functional.linear(x, weight_NM.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """C = dY^T (X A^T), dX = dY W, db = sum of dY; nothing for the weight."""
        sketched_TS, weight_NM, _ = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TN @ weight_NM.to(dy.dtype)).view(*dy.shape[:-1], weight_NM.shape[1])
        return dx, None, _bias_gradient(ctx, dy_TN), _sketch(ctx, dy_TN, sketched_TS), None, None


class SketchedConv1D(torch.autograd.Function):
    """y = X W + b of GPT-2's Conv1D, W (N, M): X (..., N) in, (..., M) out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_NM: Tensor,
        bias_M: Tensor | None,
        carrier_NKR: Tensor,
        unit_RB: Tensor,
        scale: float,
    ) -> Tensor:
        """Keep X: its sketch would be of the wrong side."""
        x_TN = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_TN, weight_NM, unit_RB)
        ctx.scale, ctx.like = scale, (carrier_NKR.shape, carrier_NKR.dtype)
        ctx.bias_dtype = None if bias_M is None else bias_M.dtype
        weight = weight_NM.to(x.dtype)
        y_TM = x_TN @ weight if bias_M is None else torch.addmm(bias_M.to(x.dtype), x_TN, weight)
        return y_TM.view(*x.shape[:-1], weight_NM.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """C = X^T (dY A^T), dX = dY W^T, db = sum of dY; nothing for the weight."""
        x_TN, weight_NM, unit_RB = ctx.saved_tensors
        dy_TM = dy.reshape(-1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TM @ weight_NM.to(dy.dtype).t()).view(*dy.shape[:-1], weight_NM.shape[0])
        sketch = _sketch(ctx, x_TN, _compress(dy_TM, unit_RB))
        return dx, None, _bias_gradient(ctx, dy_TM), sketch, None, None


def _compress(x_TM: Tensor, unit_RB: Tensor) -> Tensor:
    """X A^T block by block, without the scale, in the dtype of X."""
    unit_1RB = unit_RB.to(x_TM.dtype).unsqueeze(0)
    return ops.compress(x_TM.unsqueeze(0), unit_1RB).view(x_TM.shape[0], -1)


def _sketch(ctx: Any, rows_TN: Tensor, sketched_TS: Tensor) -> Tensor:
    """C, shaped like the carrier and in its dtype."""
    shape, dtype = ctx.like
    return (rows_TN.t() @ sketched_TS).to(dtype).mul_(ctx.scale).view(shape)


def _bias_gradient(ctx: Any, dy_TM: Tensor) -> Tensor | None:
    if ctx.bias_dtype is None or not ctx.needs_input_grad[2]:
        return None
    return dy_TM.sum(0, dtype=ctx.bias_dtype)
