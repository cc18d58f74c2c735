# SPDX-License-Identifier: Apache-2.0
"""A small run whose whole state can be compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_dist import Flora

WIDTH = 20
# Windows of three steps; the sketches of one at least are under way in any checkpoint.
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "rank": 2,
    "block": 8,
    "momentum": "flora",
    "kappa": 3,
    "state_dtype": "float32",
}
State = dict[str, object]


class Small(nn.Module):
    """Compressed and dense parameters, and a buffer that moves."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 24)
        self.norm = nn.LayerNorm(24)
        self.last = nn.Linear(24, 16, bias=False)
        self.register_buffer("seen", torch.zeros(WIDTH))
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(index)
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += x.mean(0)
        return self.last(self.norm(self.first(x)).tanh()).square().mean()


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A model in training; ``data`` tells runs apart."""

    model: nn.Module
    optimizer: Flora
    data: int

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(1000 * self.data + step)
            self.model(torch.randn(12, WIDTH, generator=generator)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> State:
        """Weights, buffers, optimizer state and settings, as values that compare by their bits."""
        return dict(_flat("", [self.model.state_dict(), self.optimizer.state_dict()]))


def start(data: int) -> Run:
    """A run before its first step; all runs begin alike."""
    model = Small()
    return Run(model=model, optimizer=Flora(model.named_parameters(), **SETTINGS), data=data)


def _flat(place: str, value: Any) -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{place}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _flat(f"{place}.{index}", item)
    elif isinstance(value, Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        raw = local.detach().contiguous().reshape(-1).view(torch.uint8)
        yield place, (value.dtype, tuple(value.shape), bytes(raw.tolist()))
    else:
        yield place, value
