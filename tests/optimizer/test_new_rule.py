# SPDX-License-Identifier: Apache-2.0
"""A momentum rule is added as CONTRIBUTING says: a class, its name, its line in the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora, reference
from flora_dist.core.state import settings as config
from flora_dist.core.step import momentum_rules
from flora_dist.core.step.momentum_rules import Squares
from tests.battery.oracle import Case, distances, reference_of

SHAPES = {"matrix": (12, 16), "dense": (6, 3), "experts": (2, 4, 16), "vector": (5,)}


@dataclass(frozen=True, kw_only=True)
class NesterovRule:
    """M <- b M + (1-b) c;  U = X + b (rank/block) (M - c) A: the toy that is added."""

    beta: float
    clips_input: ClassVar[bool] = True
    asks_history: ClassVar[bool] = False
    asks_update: ClassVar[bool] = False

    def advance(
        self, x: Any, compressed: Tensor, momentum: Tensor, now: Any, place: Any
    ) -> tuple[Tensor, Tensor]:
        new = momentum_rules.advanced(momentum, compressed, now.basis, place, beta=self.beta)
        return now.basis.correct_(x, new, compressed, place, gain=self.beta), new

    def square_sum(self, squares: Squares) -> Tensor:
        return squares.x2


def _line_of_the_reference(original: Any) -> Any:
    def rule(x: Tensor, momentum: Tensor, bases: Any, moved: bool, s: Any) -> Any:
        if s.momentum != "nesterov":
            return original(x, momentum, bases, moved, s)
        x, (old, new) = reference.clipped(x, s.clip), bases
        if new is None:
            fresh = s.beta1 * momentum + (1 - s.beta1) * x
            return x + s.beta1 * (fresh - x), fresh
        arrived = reference._move(momentum, old, new, s) if moved else momentum
        c, ratio = reference.compress(x, new), new.shape[0] / new.shape[1]
        fresh = s.beta1 * arrived + (1 - s.beta1) * c
        return x + s.beta1 * ratio * reference.expand(fresh - c, new, x.shape[1]), fresh

    return rule


@pytest.mark.parametrize(
    ("dtype", "distance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str
)
def test_a_rule_added_by_the_recipe_steps_as_its_line_in_the_reference_says(
    dtype: torch.dtype, distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "MOMENTA", (*config.MOMENTA, "nesterov"))
    monkeypatch.setitem(
        momentum_rules.RULES, "nesterov", lambda config, _: NesterovRule(beta=config.beta1)
    )
    choices = {**reference._CHOICES, "momentum": config.MOMENTA}
    monkeypatch.setattr(reference, "_CHOICES", choices)
    monkeypatch.setattr(reference, "_rule", _line_of_the_reference(reference._rule))
    case = Case(dtype=dtype, settings={"momentum": "nesterov"})
    torch.manual_seed(0)
    start = {name: torch.randn(shape, dtype=case.dtype) for name, shape in SHAPES.items()}
    oracle = reference_of(case, start)
    weights = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = Flora(weights.items(), **case.flora)
    for _ in range(7):
        for weight in weights.values():
            weight.grad = torch.randn_like(weight)
        oracle.step({name: weight.grad for name, weight in weights.items()})
        optimizer.step()
    got = {name: weight.detach() for name, weight in weights.items()}
    assert max(distances(start, dict(oracle.weights), got)) < distance


def test_every_rule_that_a_group_may_name_is_made_somewhere() -> None:
    assert set(config.MOMENTA) == set(momentum_rules.RULES)
