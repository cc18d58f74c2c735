# SPDX-License-Identifier: Apache-2.0
"""T5 as transformers 5 builds it: an encoder and a decoder, tied to one embedding."""

from __future__ import annotations

from collections.abc import Iterator

from flora_dist.cluster.planner.model import Model, Parameter, Sizes, parameter
from flora_dist.cluster.planner.reader import Reader


def t5(name: str, read: Reader) -> Model:
    """Layers are counted on from the encoder to the decoder."""
    layers = read.size("num_layers", 6)
    decoders = read.size("num_decoder_layers", layers)
    gated = str(read.settings.get("feed_forward_proj", "relu")).startswith("gated")
    heads = read.size("num_heads", 8)
    sizes = Sizes(
        vocabulary=read.size("vocab_size", 32128),
        positions=read.size("n_positions", 512),
        hidden=read.size("d_model", 512),
        inner=read.size("d_ff", 2048),
        layers=layers + decoders,
        heads=heads,
        key_value_heads=heads,
        head_width=read.size("d_kv", 64),
        is_tied=True,  # whatever the config says, transformers 5 ties them
        encoder_layers=layers,
        gated=gated,
    )
    buckets = read.size("relative_attention_num_buckets", 32)
    table = (sizes.vocabulary, sizes.hidden)
    found = [parameter("shared.weight", table, "embedding")]
    for stack, first, count in (("encoder", 0, layers), ("decoder", layers, decoders)):
        for place in range(count):
            prefix, bias = f"{stack}.block.{place}.layer", (buckets, heads) if not place else None
            found += _layer(prefix, first + place, sizes, bias, crosses=stack == "decoder")
        found.append(parameter(f"{stack}.final_layer_norm.weight", (sizes.hidden,), "vector"))
    return Model(name=name, family="t5", sizes=sizes, parameters=tuple(found))


def _layer(
    prefix: str, layer: int, sizes: Sizes, bias: tuple[int, int] | None, *, crosses: bool
) -> Iterator[Parameter]:
    hidden, wide = sizes.hidden, sizes.heads * sizes.head_width
    for place, name in enumerate(("SelfAttention", "EncDecAttention")[: 1 + crosses]):
        for matrix in ("q", "k", "v", "o"):
            shape = (hidden, wide) if matrix == "o" else (wide, hidden)
            yield parameter(f"{prefix}.{place}.{name}.{matrix}.weight", shape, "matrix", layer)
        if bias is not None and name == "SelfAttention":
            of_bias = f"{prefix}.{place}.{name}.relative_attention_bias.weight"
            yield parameter(of_bias, bias, "embedding", layer)
        yield parameter(f"{prefix}.{place}.layer_norm.weight", (hidden,), "vector", layer)
    block = f"{prefix}.{1 + crosses}"
    for matrix in ("wi_0", "wi_1") if sizes.gated else ("wi",):
        of_matrix = f"{block}.DenseReluDense.{matrix}.weight"
        yield parameter(of_matrix, (sizes.inner, hidden), "matrix", layer)
    yield parameter(f"{block}.DenseReluDense.wo.weight", (hidden, sizes.inner), "matrix", layer)
    yield parameter(f"{block}.layer_norm.weight", (hidden,), "vector", layer)
