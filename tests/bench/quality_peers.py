# SPDX-License-Identifier: Apache-2.0
"""Optimizers of others that take more than one line to build."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Together(torch.optim.Optimizer):
    """Several optimizers as one: their groups and their state."""

    def __init__(self, members: Iterable[torch.optim.Optimizer]) -> None:
        """Take them over, each with its own parameters."""
        self._members = list(members)
        super().__init__(
            [p for m in self._members for g in m.param_groups for p in g["params"]], {}
        )
        self.param_groups = [group for m in self._members for group in m.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's has overloads
        """Step each."""
        loss = None if closure is None else closure()
        for member in self._members:
            member.step()
            self.state.update(member.state)
        return loss


def muon(
    model: nn.Module,
    ends: Iterable[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    momentum: float,
    weight_decay: float,
) -> Together:
    """torch's Muon for the matrices of layers, its updates of AdamW's size; AdamW for the rest."""
    kept = {id(tensor) for tensor in ends}
    named = list(model.named_parameters())
    inner = [(n, p) for n, p in named if p.ndim == 2 and id(p) not in kept]
    names = {name for name, _ in inner}
    rest = [(n, p) for n, p in named if n not in names]
    common: Mapping[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    return Together(
        (
            torch.optim.Muon(inner, momentum=momentum, adjust_lr_fn="match_rms_adamw", **common),
            torch.optim.AdamW(rest, betas=betas, **common),
        )
    )
