# SPDX-License-Identifier: Apache-2.0
"""A model with one parameter of every shape that has gone wrong somewhere, and its data.

rows x columns, with blocks of 8: 13 x 20 tied embedding and head (ragged block, uneven rows), 37 x
20, 13 x 37 and 7 x 30 (ragged), 16 x 16 (whole blocks, where block="full" is a power of two), 9 x 3
(narrow: dense), 1 x 13 (fewer rows than ranks: empty shards), 3 x 5 x 13 experts, a 6 x 2 x 3 conv
(6 x 6), norm weights and biases, and a frozen matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, LENGTH = 13, 20, 6


class Zoo(nn.Module):
    """Tokens in, mean loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 37)
        self.down = nn.Linear(37, 13, bias=False)
        self.narrow = nn.Linear(3, 9, bias=False)
        self.square = nn.Linear(16, 16, bias=False)
        self.experts = nn.Parameter(torch.empty(3, 5, 13))
        self.wide = nn.Linear(30, 7, bias=False)
        self.conv = nn.Conv1d(2, 6, 3)
        self.single = nn.Linear(13, 1)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(index)
            with torch.no_grad():
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.1 * values)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden = self.norm(self.embed(tokens_BT))
        inner = torch.tanh(self.up(hidden))
        small = self.down(inner)
        mixed = torch.einsum("btm,enm->bten", small, self.experts).tanh()
        narrow = self.narrow(mixed[..., :3]).square().mean()
        square = self.square(inner[..., :16]).square().mean()
        wide = self.wide(inner[..., :30]).tanh().square().mean()
        conv = self.conv(inner[:, :2]).square().mean()
        single = self.single(small).square().mean()
        logits = self.head(hidden + self.frozen(hidden))
        targets = tokens_BT.roll(-1, dims=1)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss + narrow + square + wide + conv + single + mixed.square().mean()


def build(dtype: torch.dtype) -> Zoo:
    """The model with weights that are the same in every process."""
    return Zoo().to(dtype)


def batch(step: int, samples: int) -> Tensor:
    """A step's tokens, the same in every process."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (samples, LENGTH), generator=generator)


def share(tokens_BT: Tensor, rank: int, world_size: int) -> Tensor:
    """One rank's part of a batch; equal parts, so the mean over ranks is the mean of all."""
    return tokens_BT.chunk(world_size)[rank]
