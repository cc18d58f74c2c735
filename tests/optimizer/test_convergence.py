# SPDX-License-Identifier: Apache-2.0
"""Every rule that is offered for training comes to the least loss, over a range of learning rates.

A slice of ``python -m tests.optimizer.problems``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_dist.core.sketch.ops import Blocks
from flora_dist.core.state.presets import RACS, SCALE
from flora_dist.core.state.settings import MOMENTA
from flora_dist.core.step.basis import DenseBasis, Place
from flora_dist.core.step.momentum_rules import AdEMAMixRule, BlendRule, Rule
from tests.optimizer.problems import ENOUGH, flora, losses

RATES = (0.1, 0.3, 1.0)
"""The nine of the table, cut to their ends and middle."""
LOWER = (0.056, 0.18, 0.56)
"""A quarter of a power of ten below."""
HIGHER = (0.316, 1.0, 3.16)
"""Half a power of ten above."""

CONVERGING: dict[str, Mapping[str, Any]] = {
    "the default": {},
    "none": {"momentum": "none"},
    "a slow average added": {"momentum": "ademamix"},
    "Adam in the subspace": {"momentum": "subspace_adam"},
    "APOLLO": {"momentum": "apollo"},
    "dense momentum": {"rank": None},
    "growth limited": {"growth": 1.01},
    "SCALE": SCALE,
    "RACS": RACS,
}
ELSEWHERE = {"SCALE": LOWER, "RACS": HIGHER}
"""Rules whose tenfold range lies elsewhere. Divided by norms of one gradient, SCALE's updates do
not shrink with it: at lr 1 the end of the schedule leaves 6e-6 of the logistic regression. Limited
in growth to 1 % a step, RACS at lr 0.1 has not come to the quadratic's least within 150 steps."""
# Read in the sketch as a whole, momentum has the sketch's noise, 7 times its own square at rank 8
# of 64, and ``flora_strict`` never leaves its subspace: the paper's rules are kept as they are.
NOISY = {"flora", "flora_strict"}


@pytest.mark.parametrize("rule", CONVERGING)
def test_a_rule_comes_to_the_least_loss_at_learning_rates_that_differ_tenfold(rule: str) -> None:
    left = losses(flora(**CONVERGING[rule]), ELSEWHERE.get(rule, RATES))
    assert len(left) == 5
    assert max(map(max, left.values())) <= ENOUGH, left


def test_orthogonal_tiles_come_to_the_least_loss_over_a_threefold_range() -> None:
    """Every direction of a tile moves as far as its steepest one, so what is left follows lr.

    Over the nine rates, with a momentum in float32: 1e-6 over ranges of 3 (quadratic, regression),
    6, 10 and 32; at lr 1 up to 1e-5 is left. In 8 bits 1.1e-6 is left of the quadratic at lr 0.32.
    """
    left = losses(flora(orthogonalise=64, state_dtype="float32"), (0.1, 0.32, 1.0))
    assert all(max(low, middle) <= ENOUGH for low, middle, _ in left.values()), left
    assert ENOUGH < left["quadratic"][2] < 100 * ENOUGH, left


def test_a_gain_above_one_over_beta_weighs_the_gradient_negatively_and_stalls() -> None:
    """The five problems notice it: this was the default once."""
    left = losses(flora(momentum="blend", blend_gain=2.0, rank=8), RATES)
    assert min(map(min, left.values())) > 100 * ENOUGH, left


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("gain", [1.5, 2.0, 4.0])
def test_a_gain_above_one_has_the_limit_on_lr_that_its_rule_says(gain: float, beta: float) -> None:
    limit = (1 - beta) / (beta * (gain - 1))
    rule = BlendRule(beta=beta, gain=gain)
    assert _left_inside(rule, 0.95 * limit) < 0.1
    assert _left_inside(rule, 1.05 * limit) > 10


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0])
def test_a_gain_of_at_most_one_has_at_least_the_limit_of_the_plain_gradient(gain: float) -> None:
    assert _left_inside(BlendRule(beta=0.9, gain=gain), 1.95) < 1e-3


@pytest.mark.parametrize(("gain", "beta"), [(1.0, 0.9), (4.0, 0.9), (10.0, 0.99)])
def test_an_added_average_has_the_limit_on_lr_that_its_rule_says(gain: float, beta: float) -> None:
    limit = 2 * (1 + beta) / (1 + beta + gain * (1 - beta))
    rule = AdEMAMixRule(beta=beta, gain=gain)
    assert _left_inside(rule, 0.95 * limit) < 1e-3
    assert _left_inside(rule, 1.05 * limit) > 10


def _left_inside(rule: Rule, step: float) -> float:
    """|W| after many steps of lr x curvature = ``step`` inside the subspace, from 1."""
    now: Any = SimpleNamespace(basis=DenseBasis())
    place = Place(matrices=slice(0, 1), columns=(0, 1))
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    momentum = torch.zeros_like(weight)
    for _ in range(2000):
        gradient = weight.clone()
        x = Blocks(elements_ENW=gradient, whole_ENM=gradient)
        update, momentum = rule.advance(x, gradient.clone(), momentum, now, place)
        weight = weight - step * update
    return float(weight.abs())


# The problems are matrices, which it steps as ``none`` does.
AS_NONE = {"vectors"}


def test_every_rule_stands_in_the_table_or_beside_it_with_its_reason() -> None:
    named = {settings.get("momentum", "blend") for settings in CONVERGING.values()}
    assert named | NOISY | AS_NONE == set(MOMENTA)
