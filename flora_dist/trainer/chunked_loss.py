# SPDX-License-Identifier: Apache-2.0
"""The loss of some tokens at a time, so that the logits of all of them never exist.

The head's forward takes hidden states and labels and gives the sum of losses where the network
expects logits, so that every hook of a wrapper (FSDP's gathers, ZeRO's, DDP's) runs as ever. The
gradients of hidden states and head are computed beside each chunk's loss, as in Liger kernels
(arXiv 2410.10989, section 3.2): nothing is computed twice, and the head's gradient is there once.
torch's linear_cross_entropy (2.13) does the same, and returns the loss in the dtype of its input:
of bfloat16, sums of losses with 3 digits.

The gradients of weight and bias are summed in float32: rounded to bfloat16 after each of many
chunks they would keep fewer digits than those of whole logits.

Shape suffixes: T tokens, M hidden, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flora_dist.trainer.data import IGNORED

_WORDS_AT_ONCE = 1 << 13
"""Rows of the weight's gradient that a chunk's product is made for in a lower precision."""


def chunk_loss(model: nn.Module, tokens: int) -> None:
    """Let the head of a causal language model compute losses, where it is asked for them.

    Args:
        model: a network of transformers; before it is spread over processes.
        tokens: whose logits exist at once.

    Raises:
        ValueError: the head is no plain linear layer.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        raise ValueError(
            "model.loss_chunk needs a head that is a linear layer; this model's is "
            f"{type(head).__name__}. Set it to null."
        )
    # An instance's own, in place of the class's, as wrappers and hooks call it.
    head.__dict__["forward"] = ChunkingHead(head, tokens)


def chunking_head(model: nn.Module) -> ChunkingHead | None:
    """What ``chunk_loss`` has put into a model, also where that is wrapped."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return next((forward for forward in forwards if isinstance(forward, ChunkingHead)), None)


class ChunkingHead:
    """The forward of a head: logits, or the loss of the labels it is given."""

    def __init__(self, head: nn.Linear, tokens: int) -> None:
        self._head, self._tokens = head, tokens
        self._labels: Tensor | None = None
        self._loss: Tensor | None = None
        self._is_checked = False

    def sum_of_losses(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the labels that count, of the model's forward.

        Raises:
            ValueError: the model changes the logits after its head.
        """
        self._labels = labels
        try:
            loss: Tensor = model(input_ids=inputs, use_cache=False).logits
        finally:
            self._labels = None
        given, self._loss = self._loss, None
        if not self._is_checked:
            # Once, and it waits for the device. A loss of no labels shows nothing.
            self._check(loss, given)
            self._is_checked = bool(loss.isfinite() & (loss != 0))
        return loss

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., M), or the sum of losses, a scalar."""
        head = self._head
        if self._labels is None:
            return functional.linear(hidden, head.weight, head.bias)
        inputs: tuple[Tensor | None, ...] = (hidden.flatten(0, -2), head.weight, head.bias)
        if not torch.is_grad_enabled():
            # Inside of forward nobody could tell.
            inputs = tuple(None if each is None else each.detach() for each in inputs)
        labels = self._labels.flatten()
        loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch's, without types
            *inputs, labels, self._tokens
        )
        if not self._is_checked:
            self._loss = loss.detach()
        return loss

    def _check(self, loss: Tensor, given: Tensor | None) -> None:
        """A model that caps or scales its logits would do so with the loss."""
        # A loss that is not a number is the trainer's to report.
        if (
            given is None
            or loss.shape != ()
            or not torch.allclose(loss, given, rtol=0, atol=0, equal_nan=True)
        ):
            raise ValueError(
                "model.loss_chunk needs a model whose logits are what its head gives; this one "
                "changes them afterwards (caps or scales them). Set it to null."
            )


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of X W^T + b: X (T, M), W (V, M), b (V), labels (T)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TM: Tensor,
        weight_VM: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        tokens: int,
    ) -> Tensor:
        """The loss in float32, and the gradients that are asked for, kept for backward."""
        device, dtype = hidden_TM.device.type, hidden_TM.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        inputs = (hidden_TM, weight_VM, bias_V)
        rows_TM, own_VM, own_V = (None if each is None else each.to(dtype) for each in inputs)
        assert rows_TM is not None
        assert own_VM is not None
        wide = torch.promote_types(dtype, torch.float32)
        gradients = [
            torch.zeros_like(each, dtype=kept) if each is not None and needed else None
            for each, kept, needed in zip(
                (rows_TM, own_VM, own_V), (dtype, wide, wide), ctx.needs_input_grad, strict=False
            )
        ]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TM.device)
        with torch.autocast(device, enabled=False):
            for first in range(0, len(rows_TM), tokens):
                part = slice(first, first + tokens)
                loss += _add_chunk_(gradients, part, rows_TM[part], own_VM, own_V, labels_T[part])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if each is None else each.dtype for each in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """What forward has found, times the loss's own gradient; in place, so once."""
        found = [
            None if gradient is None else gradient.mul_(slope).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *found, None, None


def _add_chunk_(
    gradients: list[Tensor | None],
    part: slice,
    rows_TM: Tensor,
    weight_VM: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
) -> Tensor:
    """Add a chunk's part to the gradients of all hidden states, weight and bias; its loss."""
    logits_TV = functional.linear(rows_TM, weight_VM, bias_V)
    slope_TV = functional.log_softmax(logits_TV, -1, dtype=torch.float32)
    del logits_TV
    loss = functional.nll_loss(slope_TV, labels_T, reduction="sum", ignore_index=IGNORED)
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is of_weight is of_bias is None:
        return loss
    counts_T1 = (labels_T != IGNORED).unsqueeze(1)
    slope_TV.exp_().mul_(counts_T1)
    slope_TV.scatter_add_(1, labels_T.clamp(min=0).unsqueeze(1), -counts_T1.float())
    low_TV = slope_TV.to(rows_TM.dtype)
    if of_hidden is not None:
        torch.mm(low_TV, weight_VM, out=of_hidden[part])
    if of_weight is not None:
        for first in range(0, len(of_weight), _WORDS_AT_ONCE):
            words = slice(first, first + _WORDS_AT_ONCE)
            of_weight[words] += torch.mm(low_TV[:, words].t(), rows_TM)
    if of_bias is not None:
        of_bias += slope_TV.sum(0)
    return loss
