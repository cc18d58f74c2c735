# SPDX-License-Identifier: Apache-2.0
"""Llama and the decoders that differ from it in little, with experts or without: transformers 5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flora_dist.cluster.planner.model import Experts, Model, Parameter, Sizes, parameter
from flora_dist.cluster.planner.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """What a family has that Llama has not, and the defaults of its config."""

    norm: Literal["llama", "gemma"] = "llama"
    norms: int = 2
    """Of a layer."""
    head_norms: bool = False
    biases: Literal["none", "config", "qkv", "qkv_config"] = "none"
    """Of attention: none; of all four where attention_bias says so; of q, k and v; of these where
    qkv_bias says so."""
    is_tied: bool = False
    positions: int = 2048
    key_value_heads: int | None = None
    """None: as many as heads."""
    head_width: int | None = None
    """None: the hidden size over the heads."""
    caps_logits: bool = False
    experts: Literal["", "mixtral", "qwen2", "qwen3"] = ""
    """Whose names and sizes its experts have."""


DECODERS = {
    "llama": Decoder(biases="config"),
    "mistral": Decoder(positions=131072, key_value_heads=8),
    "qwen2": Decoder(biases="qkv", positions=32768, key_value_heads=32),
    "qwen3": Decoder(
        head_norms=True, biases="config", positions=32768, key_value_heads=32, head_width=128
    ),
    "gemma": Decoder(
        norm="gemma",
        biases="config",
        is_tied=True,
        positions=8192,
        key_value_heads=16,
        head_width=256,
    ),
    "gemma2": Decoder(
        norm="gemma",
        norms=4,
        biases="config",
        is_tied=True,
        positions=8192,
        key_value_heads=4,
        head_width=256,
        caps_logits=True,
    ),
    "gemma3_text": Decoder(
        norm="gemma",
        norms=4,
        head_norms=True,
        biases="config",
        is_tied=True,
        positions=131072,
        key_value_heads=4,
        head_width=256,
    ),
    "mixtral": Decoder(positions=131072, key_value_heads=8, experts="mixtral"),
    "qwen2_moe": Decoder(biases="qkv_config", positions=32768, key_value_heads=16, experts="qwen2"),
    "qwen3_moe": Decoder(
        head_norms=True, biases="config", positions=32768, key_value_heads=4, experts="qwen3"
    ),
}
"""``model_type`` -> the family."""


def decoder(family: Decoder, name: str, read: Reader) -> Model:
    """A model of a family, by its config."""
    sizes = _sizes(family, read)
    table, hidden = (sizes.vocabulary, sizes.hidden), sizes.hidden
    found = [parameter("model.embed_tokens.weight", table, "embedding")]
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}"
        found += _attention(f"{prefix}.self_attn", layer, family, sizes, read)
        if sizes.experts is not None and layer in sizes.experts.layers:
            found += _experts(f"{prefix}.mlp", layer, family, sizes)
        else:
            biased = not family.experts and read.flag("mlp_bias", False)
            found += _block(f"{prefix}.mlp", layer, hidden, sizes.inner, biased=biased)
        for norm in _NORMS[: sizes.norms]:
            found.append(parameter(f"{prefix}.{norm}.weight", (hidden,), "vector", layer))
    found.append(parameter("model.norm.weight", (hidden,), "vector"))
    if not sizes.is_tied:
        found.append(parameter("lm_head.weight", table, "head"))
    return Model(name=name, family=family.norm, sizes=sizes, parameters=tuple(found))


_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _sizes(family: Decoder, read: Reader) -> Sizes:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    layers = read.size("num_hidden_layers")
    return Sizes(
        vocabulary=read.size("vocab_size"),
        positions=read.size("max_position_embeddings", family.positions),
        hidden=hidden,
        inner=read.size("intermediate_size"),
        layers=layers,
        heads=heads,
        key_value_heads=read.size("num_key_value_heads", family.key_value_heads or heads),
        head_width=read.head_width(hidden, heads, family.head_width),
        is_tied=read.flag("tie_word_embeddings", family.is_tied),
        norms=family.norms,
        head_norms=family.head_norms,
        caps_logits=family.caps_logits,
        experts=_sizes_of_experts(family, read, layers),
    )


def _sizes_of_experts(family: Decoder, read: Reader, layers: int) -> Experts | None:
    if not family.experts:
        return None
    if family.experts == "mixtral":
        return Experts(
            count=read.size("num_local_experts", 8),
            chosen=read.size("num_experts_per_tok", 2),
            inner=read.size("intermediate_size"),
            layers=frozenset(range(layers)),
            weighs_in_fp32=True,
        )
    every, dense = read.size("decoder_sparse_step", 1), read.places("mlp_only_layers")
    is_qwen2 = family.experts == "qwen2"
    count = 60 if is_qwen2 else read.size("num_local_experts", 128)
    return Experts(
        count=read.size("num_experts", count),
        chosen=read.size("num_experts_per_tok", 4 if is_qwen2 else 8),
        inner=read.size("moe_intermediate_size", 1408 if is_qwen2 else 768),
        shared=read.size("shared_expert_intermediate_size", 5632) if is_qwen2 else 0,
        layers=frozenset(n for n in range(layers) if n not in dense and (n + 1) % every == 0),
    )


def _attention(
    prefix: str, layer: int, family: Decoder, sizes: Sizes, read: Reader
) -> Iterator[Parameter]:
    hidden = sizes.hidden
    queries, keys = sizes.heads * sizes.head_width, sizes.key_value_heads * sizes.head_width
    biased = _biased(family, read)
    for name, shape in (
        ("q_proj", (queries, hidden)),
        ("k_proj", (keys, hidden)),
        ("v_proj", (keys, hidden)),
        ("o_proj", (hidden, queries)),
    ):
        yield from _linear(f"{prefix}.{name}", shape, layer, biased=name in biased)
    for name in ("q_norm", "k_norm") if family.head_norms else ():
        yield parameter(f"{prefix}.{name}.weight", (sizes.head_width,), "vector", layer)


def _biased(family: Decoder, read: Reader) -> tuple[str, ...]:
    inputs = ("q_proj", "k_proj", "v_proj")
    if family.biases == "config":
        return (*inputs, "o_proj") if read.flag("attention_bias", False) else ()
    if family.biases == "qkv_config":
        return inputs if read.flag("qkv_bias", True) else ()
    return inputs if family.biases == "qkv" else ()


def _block(
    prefix: str, layer: int, hidden: int, inner: int, *, biased: bool = False
) -> Iterator[Parameter]:
    for name, shape in (
        ("gate_proj", (inner, hidden)),
        ("up_proj", (inner, hidden)),
        ("down_proj", (hidden, inner)),
    ):
        yield from _linear(f"{prefix}.{name}", shape, layer, biased=biased)


def _linear(name: str, shape: tuple[int, int], layer: int, *, biased: bool) -> Iterator[Parameter]:
    yield parameter(f"{name}.weight", shape, "matrix", layer)
    if biased:
        yield parameter(f"{name}.bias", shape[:1], "vector", layer)


def _experts(prefix: str, layer: int, family: Decoder, sizes: Sizes) -> Iterator[Parameter]:
    experts, hidden = sizes.experts, sizes.hidden
    assert experts is not None
    router = parameter(f"{prefix}.gate.weight", (experts.count, hidden), "matrix", layer)
    up = (experts.count, 2 * experts.inner, hidden)
    down = (experts.count, hidden, experts.inner)
    blocks = (
        parameter(f"{prefix}.experts.gate_up_proj", up, "experts", layer),
        parameter(f"{prefix}.experts.down_proj", down, "experts", layer),
    )
    yield from (*blocks, router) if family.experts == "qwen3" else (router, *blocks)
    if experts.shared:
        yield from _block(f"{prefix}.shared_expert", layer, hidden, experts.shared)
        yield parameter(f"{prefix}.shared_expert_gate.weight", (1, hidden), "matrix", layer)
