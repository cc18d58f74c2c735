# SPDX-License-Identifier: Apache-2.0
"""A decoder of llama's kind in plain torch, for machines that have nothing else.

Names and shapes of its parameters are those of transformers' LlamaForCausalLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a decoder; the head is not tied to the embedding."""

    words: int = 32000
    width: int
    inner: int
    layers: int
    heads: int


SHAPES = {
    "60m": Shape(width=512, inner=1376, layers=8, heads=8),
    "130m": Shape(width=768, inner=2048, layers=12, heads=12),
}
"""configs/model/llama_60m.json and llama_130m.json."""
TOY = Shape(words=600, width=64, inner=128, layers=1, heads=2)


class Attention(nn.Module):
    """Causal, with positions by rotation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        def split(y_BTD: Tensor) -> Tensor:
            sequences, length, _ = y_BTD.shape
            return y_BTD.view(sequences, length, self.heads, -1).transpose(1, 2)

        query, key, value = (split(f(x_BTD)) for f in (self.q_proj, self.k_proj, self.v_proj))
        seen = functional.scaled_dot_product_attention(
            _rotated(query), _rotated(key), value, is_causal=True
        )
        out: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return out


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), Gated(shape)
        self.input_layernorm = nn.RMSNorm(shape.width, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=1e-6)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.words, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)


class Decoder(nn.Module):
    """Weights from a normal law of 0.02, as llama's initializer_range has it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.width, shape.words, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The mean loss of each next token."""
        x_BTD = self.model.embed_tokens(tokens_BT[:, :-1])
        for layer in self.model.layers:
            x_BTD = layer(x_BTD)
        logits = self.lm_head(self.model.norm(x_BTD)).float()
        loss: Tensor = functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())
        return loss


def _rotated(x_BHTD: Tensor) -> Tensor:
    """Pairs of numbers half a head apart are turned by their position (arXiv 2104.09864)."""
    length, size = x_BHTD.shape[-2:]
    device = x_BHTD.device
    speeds = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(length, device=device)[:, None] * speeds
    cos, sin = (f(angles).to(x_BHTD.dtype) for f in (torch.cos, torch.sin))
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
