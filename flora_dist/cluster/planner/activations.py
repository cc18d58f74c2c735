# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of one micro-batch's forward, as transformers 5 and torch 2.13 compute it.

The model: attention by ``scaled_dot_product_attention`` in a kernel that keeps no scores (flash),
dropout 0, cross-entropy over all logits in float32, the whole network in ``precision``. With S
tokens of a micro-batch, b bytes of the precision, h hidden, q and k widths of all query and key
heads, f inner width, V words (counted by ``saved_tensors_hooks``, each storage once):

    llama, a norm    S (4 h + 4) + S h b: its input in fp32, 1 / RMS, what it scales
    llama, a layer   2 norms + S (2 h + 2 q + 2 k + 4 f) b + 4 S heads: inputs of linear layers;
                     q, k, v, output and log-sums of attention; gate, its SiLU, up, their product
    gpt2, a norm     S (h + 2) b: input, mean, deviation
    gpt2, a layer    2 norms + S (6 h + 2 f) b + 4 S heads; 5 f for gelu_new, of several operators
    the rest         a norm, the head's input S h b, softmax of logits 4 S V, tokens and labels

Checkpointing keeps S h b per layer, and all of one layer or of the rest while that is in backward.
``fused`` keeps X A^T and A of each linear layer instead of X (GPT-2: of the head). Autocast (DDP in
bfloat16) runs norms in fp32, gives every linear layer a bfloat16 copy of its input of its own, and
keeps bfloat16 copies of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flora_dist.cluster.planner.model import Model, Sizes

STATED = (
    "autograd's own of one micro-batch: attention without stored scores (sdpa), dropout 0, "
    "cross-entropy over all logits in fp32"
)
"""The model, for people."""
_FP32 = 4
_INDEX = 8
"""Bytes of a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch on a rank."""

    sequences: int
    length: int
    element: int
    """Bytes of the precision."""
    checkpointing: bool = False
    autocast: bool = False
    """``element`` is that of matrix products alone; weights are in fp32."""

    @property
    def norm_element(self) -> int:
        """Bytes of a number between linear layers."""
        return _FP32 if self.autocast else self.element

    @property
    def tokens(self) -> int:
        """S."""
        return self.sequences * self.length


def activation_bytes(model: Model, batch: Batch, fused: tuple[int, int] | None = None) -> int:
    """Bytes kept at the fullest moment.

    Args:
        model: its sizes and family.
        batch: of one rank.
        fused: (rank, block) of fused linear layers; None: there are none.
    """
    one = _LAYERS[model.family](model.sizes, batch, fused)
    rest = _rest(model, batch, fused)
    layers = model.sizes.layers
    copies = batch.element * _multiplied(model) if batch.autocast and fused is None else 0
    if fused is not None:
        widths = (*(parameter.shape[1] for parameter in model.linears()), model.sizes.hidden)
        copies = _FP32 * sum(math.prod(_narrowed(width, fused)) for width in widths)
    if batch.checkpointing:
        inputs = layers * batch.tokens * model.sizes.hidden * batch.norm_element
        return inputs + copies + max(one, rest)
    return layers * one + rest + copies


def _multiplied(model: Model) -> int:
    """Elements of the weights of linear layers, the head among them."""
    linears = sum(parameter.numel for parameter in model.linears())
    return linears + model.sizes.vocabulary * model.sizes.hidden


def logits_gradient_bytes(model: Model, batch: Batch) -> int:
    """The gradient of the logits: in fp32, and its copy in a lower precision."""
    low = 0 if batch.element == 4 else batch.element
    return batch.tokens * model.sizes.vocabulary * (4 + low)


def _llama_layer(sizes: Sizes, batch: Batch, fused: tuple[int, int] | None) -> int:
    hidden, inner = sizes.hidden, sizes.inner
    queries, keys = sizes.heads * sizes.head_width, sizes.key_value_heads * sizes.head_width
    inputs = (5 if batch.autocast else 2) * hidden + inner
    if fused is not None:  # q, k, v of one input, o, gate and up of another, down
        inputs = 5 * _sketch(hidden, fused) + _sketch(queries, fused) + _sketch(inner, fused)
    kept = inputs + 2 * queries + 2 * keys + 3 * inner
    norms = 2 * _llama_norm(sizes, batch)
    return norms + batch.tokens * (kept * batch.element + 4 * sizes.heads)


def _gpt2_layer(sizes: Sizes, batch: Batch, fused: tuple[int, int] | None) -> int:
    del fused  # Conv1D keeps X
    hidden = sizes.hidden
    activation = 5 if sizes.composed_gelu else 2
    kept = 6 * hidden + activation * sizes.inner
    norms = 2 * (hidden + 2) * batch.norm_element
    return batch.tokens * (kept * batch.element + norms + 4 * sizes.heads)


def _rest(model: Model, batch: Batch, fused: tuple[int, int] | None) -> int:
    sizes, tokens = model.sizes, batch.tokens
    head = sizes.hidden if fused is None else _sketch(sizes.hidden, fused)
    norm = _llama_norm(sizes, batch)
    if model.family == "gpt2":
        norm = tokens * (sizes.hidden + 2) * batch.norm_element
    rotary = 0
    if model.family == "llama":
        rotary = 2 * batch.length * sizes.head_width * batch.norm_element
    logits = tokens * 4 * sizes.vocabulary
    return norm + rotary + tokens * head * batch.element + logits + 2 * tokens * _INDEX


def _llama_norm(sizes: Sizes, batch: Batch) -> int:
    return batch.tokens * (_FP32 * (sizes.hidden + 1) + sizes.hidden * batch.norm_element)


def _sketch(width: int, fused: tuple[int, int]) -> int:
    """Numbers of X A^T for X of so many."""
    rank, block = _narrowed(width, fused)
    return -(-width // block) * rank


def _narrowed(width: int, fused: tuple[int, int]) -> tuple[int, int]:
    """Rank and block where rows are narrower than a block (core/state/spec.py)."""
    rank, wide = fused
    block = min(wide, 1 << (width.bit_length() - 1))
    return max(1, rank * block // wide), block


_LAYERS = {"llama": _llama_layer, "gpt2": _gpt2_layer}
