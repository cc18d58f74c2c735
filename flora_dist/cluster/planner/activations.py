# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of one micro-batch's forward, as transformers 5 and torch 2.13 compute it.

The model: attention by ``scaled_dot_product_attention`` in a kernel that keeps no scores (flash),
dropout 0, cross-entropy over all logits in float32, the whole network in ``precision``. With S
tokens of a micro-batch, b bytes of the precision, h hidden, q and k widths of all query and key
heads, f inner width, V words (counted by ``saved_tensors_hooks``, each storage once):

    llama, a norm    S (4 h + 4) + S h b: its input in fp32, 1 / RMS, what it scales
    gemma, a norm    S (8 h + 4) + 4 h: its input and what it scales in fp32, 1 / RMS, 1 + weight
    llama, a layer   norms + S (2 h + 2 q + 2 k + 4 f) b + 4 S heads: inputs of linear layers;
                     q, k, v, output and log-sums of attention; gate, its SiLU, up, their product;
                     norms of queries and keys, where a family has them
    experts          instead of S 4 f b, with P = S x chosen: P (2 h + 4 f) b, weights and places of
                     pairs, the router's probabilities; S (4 g + h + 1) b of a shared one of width g
    gpt2, a norm     S (h + 2) b: input, mean, deviation
    gpt2, a layer    2 norms + S (6 h + 2 f) b + 4 S heads; 5 f for gelu_new, of several operators
    t5, a norm       as llama's, and S h b more in a low precision
    t5, a layer      2 norms (decoder: 3), attention by scores in fp32, which a learned bias needs,
                     4 S L heads + 12 S q; the decoder's of the encoder's output without; f, or 7 f
                     where gated by gelu_new
    the rest         a norm, the head's input S h b, softmax of logits 4 S V, tokens and labels; in
                     chunks of losses the gradient of the head's input, and tokens

Checkpointing keeps S h b per layer, and all of one layer or of the rest while that is in backward.
``fused`` keeps X A^T and A of each linear layer instead of X (GPT-2: of the head; not of experts).
Autocast (DDP in bfloat16) runs norms in fp32, gives every linear layer a bfloat16 copy of its input
of its own, and keeps bfloat16 copies of the weights. T5 has S tokens in each of its two halves.
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
class MicroBatchShape:
    """One micro-batch on a rank."""

    sequences: int
    length: int
    element: int
    """Bytes of the precision."""
    checkpointing: bool = False
    autocast: bool = False
    """``element`` is that of matrix products alone; weights are in fp32."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; None: all."""

    @property
    def norm_element(self) -> int:
        """Bytes of a number between linear layers."""
        return _FP32 if self.autocast else self.element

    @property
    def tokens(self) -> int:
        """S."""
        return self.sequences * self.length


def activation_bytes(
    model: Model, batch: MicroBatchShape, fused: tuple[int, int] | None = None
) -> int:
    """Bytes kept at the fullest moment.

    Args:
        model: its sizes and family.
        batch: of one rank.
        fused: (rank, block) of fused linear layers; None: there are none.
    """
    beside, layers, rest = _parts(model, batch, fused)
    return beside + (max(*layers, rest) if batch.checkpointing else sum(layers) + rest)


def head_activation_bytes(
    model: Model, batch: MicroBatchShape, fused: tuple[int, int] | None = None
) -> int:
    """Of ``activation_bytes`` what is kept while the head is in backward."""
    beside, layers, rest = _parts(model, batch, fused)
    return beside + rest + (0 if batch.checkpointing else sum(layers))


def _parts(
    model: Model, batch: MicroBatchShape, fused: tuple[int, int] | None
) -> tuple[int, list[int], int]:
    """Bytes beside both, of each layer, and of the rest."""
    every = [_layer(model, place, batch, fused) for place in range(model.sizes.layers)]
    copies = batch.element * _multiplied(model) if batch.autocast and fused is None else 0
    if fused is not None:
        widths = (*(parameter.shape[1] for parameter in model.linears()), model.sizes.hidden)
        copies = _FP32 * sum(math.prod(_narrowed(width, fused)) for width in widths)
    if batch.checkpointing:
        copies += len(every) * batch.tokens * model.sizes.hidden * batch.norm_element
    return copies, every, _rest(model, batch, fused)


def _multiplied(model: Model) -> int:
    """Elements of the weights of linear layers, the head among them."""
    linears = sum(parameter.numel for parameter in model.linears())
    return linears + model.sizes.vocabulary * model.sizes.hidden


def logits_gradient_bytes(model: Model, batch: MicroBatchShape) -> int:
    """Gradients of all logits, of cross-entropy and of its log-softmax.

    Both are in fp32, T5's as its logits are.

    In chunks: the logits of one, their fp32 copy and log-softmax, beside the head's gradient, which
    forward sums in fp32; or that gradient and its copy in a lower precision, in backward.
    """
    words = model.sizes.vocabulary
    low = 0 if batch.element == _FP32 else batch.element
    if batch.loss_chunk is not None:
        chunk = min(batch.loss_chunk, batch.tokens)
        making = words * chunk * (2 * _FP32 + low)
        return words * model.sizes.hidden * _FP32 + max(making, words * model.sizes.hidden * low)
    return 2 * batch.tokens * words * (batch.element if model.family == "t5" else _FP32)


def _layer(model: Model, place: int, batch: MicroBatchShape, fused: tuple[int, int] | None) -> int:
    if model.family == "gpt2":
        return _gpt2_layer(model.sizes, batch)
    if model.family == "t5":
        return _t5_layer(model.sizes, place, batch)
    return _decoder_layer(model, place, batch, fused)


def _decoder_layer(
    model: Model, place: int, batch: MicroBatchShape, fused: tuple[int, int] | None
) -> int:
    sizes, hidden = model.sizes, model.sizes.hidden
    queries, keys = sizes.heads * sizes.head_width, sizes.key_value_heads * sizes.head_width
    inputs = (5 if batch.autocast else 2) * hidden
    if fused is not None:  # q, k, v of one input, o, gate and up of another
        inputs = 5 * _sketch(hidden, fused) + _sketch(queries, fused)
    kept = inputs + 2 * queries + 2 * keys
    norms = sizes.norms * _norm(model, batch, batch.tokens, hidden)
    if sizes.head_norms:
        heads = (sizes.heads, sizes.key_value_heads)
        norms += sum(_norm(model, batch, batch.tokens * many, sizes.head_width) for many in heads)
    feed = _experts(sizes, batch) if _has_experts(sizes, place) else _block(sizes, batch, fused)
    return norms + batch.tokens * (kept * batch.element + 4 * sizes.heads) + feed


def _block(sizes: Sizes, batch: MicroBatchShape, fused: tuple[int, int] | None) -> int:
    """Gate, its activation, up, and their product: what the last matrix multiplies."""
    product = sizes.inner if fused is None else _sketch(sizes.inner, fused)
    return batch.tokens * (3 * sizes.inner + product) * batch.element


def _has_experts(sizes: Sizes, place: int) -> bool:
    return sizes.experts is not None and place in sizes.experts.layers


def _experts(sizes: Sizes, batch: MicroBatchShape) -> int:
    """As grouped products (transformers' grouped_mm): pairs of a token and an expert, sorted."""
    experts, hidden = sizes.experts, sizes.hidden
    assert experts is not None
    pairs, element = batch.tokens * experts.chosen, batch.element
    weight = _FP32 if experts.weighs_in_fp32 else element
    of_pairs = (2 * hidden + 4 * experts.inner) * element + weight + 4 * _INDEX
    router = _FP32 * experts.count
    if experts.weighs_in_fp32:  # what is chosen and its sum
        router += _FP32 * (experts.chosen + 1)
    shared = (4 * experts.shared + hidden + 1) * element if experts.shared else 0
    return pairs * of_pairs + batch.tokens * (router + shared) + 4 * experts.count


def _gpt2_layer(sizes: Sizes, batch: MicroBatchShape) -> int:
    """Conv1D keeps X, also where linear layers are fused."""
    hidden = sizes.hidden
    activation = 5 if sizes.composed_gelu else 2
    kept = 6 * hidden + activation * sizes.inner
    norms = 2 * (hidden + 2) * batch.norm_element
    return batch.tokens * (kept * batch.element + norms + 4 * sizes.heads)


def _t5_layer(sizes: Sizes, place: int, batch: MicroBatchShape) -> int:
    tokens, element, hidden = batch.tokens, batch.element, sizes.hidden
    wide, is_decoder = sizes.heads * sizes.head_width, place >= sizes.encoder_layers
    scores = _FP32 * (batch.length * sizes.heads + 3 * wide) + wide * element
    flash = 4 * wide * element + _FP32 * sizes.heads
    norms = (3 if is_decoder else 2) * _t5_norm(sizes, batch)
    products = (7 if sizes.gated else 1) * sizes.inner * element
    inputs = (3 if is_decoder else 2) * hidden * element
    mask = batch.length**2 if is_decoder else 0
    return norms + tokens * (scores + is_decoder * flash + products + inputs) + mask


def _t5_norm(sizes: Sizes, batch: MicroBatchShape) -> int:
    """In fp32 what it scales is its input."""
    copy = 0 if batch.norm_element == _FP32 else sizes.hidden * batch.norm_element
    return batch.tokens * (_FP32 * (sizes.hidden + 1) + sizes.hidden * batch.norm_element + copy)


def _rest(model: Model, batch: MicroBatchShape, fused: tuple[int, int] | None) -> int:
    sizes, tokens = model.sizes, batch.tokens
    head = (sizes.hidden if fused is None else _sketch(sizes.hidden, fused)) * batch.element
    logits = tokens * 4 * sizes.vocabulary
    if sizes.caps_logits:
        logits += tokens * sizes.vocabulary * batch.element
    norm = _norm(model, batch, tokens, sizes.hidden)
    between = 2 * batch.length * sizes.head_width * batch.norm_element  # of rotary positions
    if model.family == "gpt2":
        norm, between = tokens * (sizes.hidden + 2) * batch.norm_element, 0
    elif model.family == "t5":  # two norms, the encoder's output, biases and their places
        logits = tokens * batch.element * sizes.vocabulary
        norm = 2 * _t5_norm(sizes, batch) + tokens * sizes.hidden * batch.element
        between = batch.length**2 * (sizes.heads * batch.element + 2 * _INDEX)
    if batch.loss_chunk is not None:  # in place of the head's input its gradient, and no labels
        return norm + between + tokens * (head + _INDEX)
    return norm + between + tokens * head + logits + 2 * tokens * _INDEX


def _norm(model: Model, batch: MicroBatchShape, rows: int, width: int) -> int:
    if model.family == "gemma":
        return rows * _FP32 * (2 * width + 1) + _FP32 * width
    return rows * (_FP32 * (width + 1) + width * batch.norm_element)


def _sketch(width: int, fused: tuple[int, int]) -> int:
    """Numbers of X A^T for X of so many."""
    rank, block = _narrowed(width, fused)
    return -(-width // block) * rank


def _narrowed(width: int, fused: tuple[int, int]) -> tuple[int, int]:
    """Rank and block where rows are narrower than a block (core/state/spec.py)."""
    rank, wide = fused
    block = min(wide, 1 << (width.bit_length() - 1))
    return max(1, rank * block // wide), block
