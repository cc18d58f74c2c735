# SPDX-License-Identifier: Apache-2.0
"""A language model as the planner knows it: its parameters by name, shape and kind, its sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["embedding", "head", "matrix", "experts", "vector"]
"""experts: the matrices of all experts of a layer, one 3-D tensor."""
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
class Experts:
    """Feed-forward blocks of which a router chooses a few for each token."""

    count: int
    chosen: int
    """Of them, for a token."""
    inner: int
    """Width between the two halves of one."""
    shared: int = 0
    """That of one that every token passes besides; 0: there is none."""
    layers: frozenset[int]
    """Places of the layers that have them; the others have one block as usual."""
    weighs_in_fp32: bool = False
    """Mixtral's, which divides the weights of the chosen by their sum and leaves them in fp32."""


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
    encoder_layers: int = 0
    """Of them, the first that are an encoder's."""
    gated: bool = True
    """The feed-forward block multiplies two halves (T5: of version 1.1)."""
    norms: int = 2
    """Of a decoder's layer."""
    head_norms: bool = False
    """Queries and keys are scaled head by head."""
    caps_logits: bool = False
    """Gemma 2 bends logits with a tanh."""
    experts: Experts | None = None


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
        """The matrices of the layers; those of experts are not among them."""
        return (parameter for parameter in self.parameters if parameter.kind == "matrix")


def parameter(name: str, shape: tuple[int, ...], kind: Kind, layer: int = ROOT) -> Parameter:
    """A parameter, outside of layers unless told."""
    return Parameter(name=name, shape=shape, kind=kind, layer=layer)
