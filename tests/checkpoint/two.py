# SPDX-License-Identifier: Apache-2.0
"""A model of a matrix, a bias and buffers, and all that a checkpoint must bring back of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flora_dist import Flora

SETTINGS: dict[str, Any] = {"lr": 1e-2, "rank": 2, "block": 8, "kappa": 3, "state_dtype": "float32"}


class Two(nn.Module):
    """A matrix, a bias and a buffer."""

    def __init__(self, columns: int = 24) -> None:
        super().__init__()
        torch.manual_seed(columns)
        self.linear = nn.Linear(columns, 10)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.linear(x_NI).square().mean()


def trained(steps: int = 2, **settings: Any) -> tuple[Two, Flora]:
    model = Two()
    optimizer = Flora(model.named_parameters(), **{**SETTINGS, **settings})
    train(model, optimizer, steps)
    return model, optimizer


def train(model: Two, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(4, model.linear.in_features, dtype=model.linear.weight.dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.count += 1


def everything(model: nn.Module, optimizer: Flora) -> dict[str, Any]:
    found: dict[str, Any] = {n: v.clone() for n, v in model.state_dict().items()}
    for index, state in enumerate(optimizer.state.values()):
        found |= {
            f"{index}.{k}": v.clone() if isinstance(v, Tensor) else v for k, v in state.items()
        }
    return found | {f"group {k}": v for k, v in optimizer.param_groups[0].items() if k != "params"}
