# SPDX-License-Identifier: Apache-2.0
"""The parameters of a transformers model by its config file alone: names, shapes, kinds.

Llama and GPT-2, as transformers 5 builds them; a test compares every file of configs/model with the
modules themselves. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["embedding", "head", "matrix", "vector"]
TABLES: tuple[Kind, ...] = ("embedding", "head")
"""Kinds whose sizes grow with the vocabulary or the positions."""
ROOT = -1
"""The unit of what is in no layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One trainable tensor; tied ones are one, by the first of their names."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int
    """Place of its transformer layer; ``ROOT`` for embeddings, the last norm and the head."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What activations depend on."""

    vocabulary: int
    positions: int
    hidden: int
    inner: int
    """Width between the two halves of the feed-forward block."""
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    is_tied: bool
    """The head is the embedding."""
    composed_gelu: bool = False
    """GPT-2's gelu_new, which is made of several operators that each keep something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A language model."""

    name: str
    family: str
    sizes: Sizes
    parameters: tuple[Parameter, ...]
    """In the order of ``named_parameters()``."""

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    def linears(self) -> Iterator[Parameter]:
        """The matrices of the layers."""
        return (parameter for parameter in self.parameters if parameter.kind == "matrix")


def read_model(path: Path, *, vocabulary: int | None = None) -> Model:
    """Read a transformers config.

    Args:
        path: a JSON file with a ``model_type``.
        vocabulary: tokens; None: the file's.

    Raises:
        ValueError: the file cannot be read, is not a JSON object, names an unknown family, or
            has a size that is not a whole number above 0.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--model must be a transformers config in JSON; {str(path)!r} gave: {error}. See "
            "configs/model for examples."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all of them
            f"--model must hold a JSON object; {str(path)!r} holds {type(settings).__name__}. See "
            "configs/model for examples."
        )
    family = settings.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"--model must be of a known family, {' or '.join(_FAMILIES)}; {str(path)!r} has "
            f"model_type {family!r}. Describe the network by the nearest of them."
        )
    if vocabulary is not None:
        settings["vocab_size"] = vocabulary
    return _FAMILIES[family](path.stem, _Reader(path=path, settings=settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    path: Path
    settings: Mapping[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        value = self.settings.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{key} must be a whole number of at least 1; {str(self.path)!r} has {value!r}. "
                "Correct the file."
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.settings.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all of them
                f"{key} must be true or false; {str(self.path)!r} has {value!r}. Correct the file."
            )
        return value

    def heads_of(self, hidden: int, heads: int) -> int:
        if hidden % heads:
            raise ValueError(
                f"the hidden size must be a multiple of the heads; {str(self.path)!r} has {hidden} "
                f"and {heads}. Correct the file."
            )
        return hidden // heads


def _llama(name: str, read: _Reader) -> Model:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    head_width = read.settings.get("head_dim")
    width = read.heads_of(hidden, heads) if head_width is None else read.size("head_dim")
    sizes = Sizes(
        vocabulary=read.size("vocab_size"),
        positions=read.size("max_position_embeddings", 2048),
        hidden=hidden,
        inner=read.size("intermediate_size"),
        layers=read.size("num_hidden_layers"),
        heads=heads,
        key_value_heads=read.size("num_key_value_heads", heads),
        head_width=width,
        is_tied=read.flag("tie_word_embeddings", False),
    )
    table = (sizes.vocabulary, hidden)
    biased = (read.flag("attention_bias", False), read.flag("mlp_bias", False))
    found = [_of("model.embed_tokens.weight", table, "embedding")]
    for layer in range(sizes.layers):
        found += _llama_layer(layer, sizes, *biased)
    found.append(_of("model.norm.weight", (hidden,), "vector"))
    if not sizes.is_tied:
        found.append(_of("lm_head.weight", table, "head"))
    return Model(name=name, family="llama", sizes=sizes, parameters=tuple(found))


def _llama_layer(
    layer: int, sizes: Sizes, attention_bias: bool, mlp_bias: bool
) -> Iterator[Parameter]:
    hidden, inner = sizes.hidden, sizes.inner
    queries, keys = sizes.heads * sizes.head_width, sizes.key_value_heads * sizes.head_width
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    prefix = f"model.layers.{layer}"
    for name, shape in shapes.items():
        yield _of(f"{prefix}.{name}.weight", shape, "matrix", layer)
        if attention_bias if name.startswith("self_attn") else mlp_bias:
            yield _of(f"{prefix}.{name}.bias", shape[:1], "vector", layer)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _of(f"{prefix}.{name}.weight", (hidden,), "vector", layer)


def _gpt2(name: str, read: _Reader) -> Model:
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
        _of("transformer.wte.weight", table, "embedding"),
        _of("transformer.wpe.weight", (sizes.positions, hidden), "embedding"),
    ]
    for layer in range(sizes.layers):
        found += _gpt2_layer(layer, hidden, sizes.inner)
    found += _with_bias("transformer.ln_f", (hidden,), hidden, ROOT)
    if not sizes.is_tied:
        found.append(_of("lm_head.weight", table, "head"))
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
    weight = _of(f"{name}.weight", shape, kind, layer)
    return weight, replace(weight, name=f"{name}.bias", shape=(outputs,), kind="vector")


def _of(name: str, shape: tuple[int, ...], kind: Kind, layer: int = ROOT) -> Parameter:
    return Parameter(name=name, shape=shape, kind=kind, layer=layer)


_FAMILIES = {"llama": _llama, "gpt2": _gpt2}
