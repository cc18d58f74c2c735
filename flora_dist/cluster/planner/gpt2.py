# SPDX-License-Identifier: Apache-2.0
"""GPT-2 as transformers 5 builds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flora_dist.cluster.planner.model import ROOT, Kind, Model, Parameter, Sizes, parameter
from flora_dist.cluster.planner.reader import Reader


def gpt2(name: str, read: Reader) -> Model:
    """A decoder with learned positions and joint queries, keys and values."""
    hidden, heads = read.size("n_embd", 768), read.size("n_head", 12)
    sizes = Sizes(
        vocabulary=read.size("vocab_size", 50257),
        positions=read.size("n_positions", 1024),
        hidden=hidden,
        inner=read.size("n_inner", 4 * hidden),
        layers=read.size("n_layer", 12),
        heads=heads,
        key_value_heads=heads,
        head_width=read.heads_of(hidden, heads),
        is_tied=read.flag("tie_word_embeddings", True),
        composed_gelu=read.settings.get("activation_function", "gelu_new") == "gelu_new",
    )
    table = (sizes.vocabulary, hidden)
    found = [
        parameter("transformer.wte.weight", table, "embedding"),
        parameter("transformer.wpe.weight", (sizes.positions, hidden), "embedding"),
    ]
    for layer in range(sizes.layers):
        found += _gpt2_layer(layer, hidden, sizes.inner)
    found += _with_bias("transformer.ln_f", (hidden,), hidden, ROOT)
    if not sizes.is_tied:
        found.append(parameter("lm_head.weight", table, "head"))
    return Model(name=name, family="gpt2", sizes=sizes, parameters=tuple(found))


def _gpt2_layer(layer: int, hidden: int, inner: int) -> Iterator[Parameter]:
    for name, shape, outputs in (
        ("ln_1", (hidden,), hidden),
        ("attn.c_attn", (hidden, 3 * hidden), 3 * hidden),
        ("attn.c_proj", (hidden, hidden), hidden),
        ("ln_2", (hidden,), hidden),
        ("mlp.c_fc", (hidden, inner), inner),
        ("mlp.c_proj", (inner, hidden), hidden),
    ):
        yield from _with_bias(f"transformer.h.{layer}.{name}", shape, outputs, layer)


def _with_bias(
    name: str, shape: tuple[int, ...], outputs: int, layer: int
) -> tuple[Parameter, Parameter]:
    kind: Kind = "vector" if len(shape) == 1 else "matrix"
    weight = parameter(f"{name}.weight", shape, kind, layer)
    return weight, replace(weight, name=f"{name}.bias", shape=(outputs,), kind="vector")
