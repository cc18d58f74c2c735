# SPDX-License-Identifier: Apache-2.0
"""Optimizers of others that take more than one line to build."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.quality_plan import Row

GALORE: Mapping[str, Any] = {"rank": 32, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
"""A quarter of the small model's width, as 512 of 2048; the rest is the authors' example."""


def package_rows() -> Iterator[Row]:
    """What users reach for today, where the packages are installed."""
    kept: dict[str, Any] = {"weight_decay": 0.0}
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield Row(
            name="AdamW 8-bit (bitsandbytes)", factor="package", optimizer="adamw8", options=kept
        )
    if importlib.util.find_spec("galore_torch") is not None:
        yield Row(name="GaLore, rank 32", factor="package", optimizer="galore", options=kept)


def adamw8(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW whose moments are kept in 8 bits, by the package bitsandbytes."""
    made: torch.optim.Optimizer = importlib.import_module("bitsandbytes.optim").AdamW8bit(
        model.parameters(), lr=lr, weight_decay=weight_decay
    )
    return made


def galore(
    model: nn.Module, ends: Iterable[Tensor], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW in GaLore's subspace for the matrices of layers, and as it is for the rest."""
    kept = {id(tensor) for tensor in ends}
    inner = [p for p in model.parameters() if p.ndim == 2 and id(p) not in kept]
    projected = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in projected]
    made: torch.optim.Optimizer = importlib.import_module("galore_torch").GaLoreAdamW(
        [{"params": rest}, {"params": inner, **GALORE}], lr=lr, weight_decay=weight_decay
    )
    return made


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
