# SPDX-License-Identifier: Apache-2.0
"""Advice before a run: its formulas against what sketches and rules do, and when it is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_dist import Flora
from flora_dist.core.parameters.advice import advice, advice_on_rate, coverage, noise_of_update
from flora_dist.core.sketch.matrices import sketch_matrix
from flora_dist.core.sketch.ops import Blocks
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry, geometry_of
from flora_dist.core.step.basis import DenseBasis, Place
from flora_dist.core.step.momentum_rules import ApolloRule
from tests.optimizer import runs

DRAWS = 400


def _held(**settings: Any) -> tuple[Geometry, FloraConfig]:
    config = FloraConfig(**{"momentum": "flora_strict", "rank": 8, "block": 64, **settings})
    return geometry_of("w", (4, 64), config), config


def _matrix(kind: str, rank: int, key: int) -> Tensor:
    return sketch_matrix(kind, key=key, rank=rank, block=64, dtype=torch.float64, device="cpu")


def test_coverage_is_the_mean_share_of_a_direction_inside_the_windows_together() -> None:
    size, _ = _held()
    torch.manual_seed(0)
    found = []
    for draw in range(DRAWS):
        left = torch.nn.functional.normalize(torch.randn(64, dtype=torch.float64), dim=0)
        for window in range(3):  # what no window's subspace has, one window after the other
            sketch = _matrix("hadamard", 8, 1000 * draw + window)
            left = left - (8 / 64) * left @ sketch.T @ sketch
        found.append(1 - left.square().sum())
    mean = torch.stack(found)
    error = float(mean.std()) / DRAWS**0.5
    assert abs(float(mean.mean()) - coverage(size, kappa=10, steps=29)) < 4 * error < 0.03


def _update(rule: str, gradients: Tensor, sketch: Tensor, gain: float) -> Tensor:
    """By the rule's formula at beta1 = 0.5, from gradients with the newest first."""
    weights = 0.5 * 0.5 ** torch.arange(len(gradients), dtype=torch.float64)
    newest, average = gradients[0], weights @ gradients
    if rule == "flora":  # (1-b) X + b M A
        return weights[0] * newest + (average - weights[0] * newest) @ sketch.T @ sketch
    if rule == "flora_strict":
        return average @ sketch.T @ sketch
    # Inside its subspace: of rank orthonormal directions, so over as many as a block has.
    return ((1 - gain) * newest + gain * average) @ sketch.T


@pytest.mark.parametrize(
    ("rule", "kind", "gain"),
    [
        ("flora_strict", "hadamard", 1.0),
        ("flora_strict", "gaussian", 1.0),
        ("flora_strict", "rademacher", 1.0),
        ("flora", "hadamard", 1.0),
        ("flora", "gaussian", 1.0),
        ("blend", "hadamard", 1.0),
        ("blend", "hadamard", 4.0),
    ],
)
def test_the_noise_of_an_update_is_the_formula_over_independent_gradients(
    rule: str, kind: str, gain: float
) -> None:
    size, config = _held(momentum=rule, sketch=kind, rank=4, beta1=0.5, blend_gain=gain)
    torch.manual_seed(0)
    ratios = []
    for draw in range(DRAWS):
        gradients = torch.randn(12, 64, dtype=torch.float64)  # 0.5^12 of the first is left
        ratios.append(_update(rule, gradients, _matrix(kind, 4, draw), gain).square().sum() / 64)
    found = torch.stack(ratios)
    error = float(found.std()) / DRAWS**0.5
    assert abs(float(found.mean()) - noise_of_update(size, config)) < 4 * error
    assert 4 * error < 0.2 * float(found.mean())


def test_blend_breaks_even_at_the_gain_that_it_is_warned_of_at_any_ratio() -> None:
    for beta in (0.5, 0.9, 0.99):
        most = (1 + beta) / beta
        for rank, gain, is_beyond in ((1, 1.01 * most, True), (32, 0.99 * most, False)):
            held = _held(momentum="blend", rank=rank, beta1=beta, blend_gain=gain)
            assert (noise_of_update(*held) > 1) == is_beyond


@pytest.mark.parametrize(("rank", "ratio"), [(1, 3.1), (4, 1.4), (16, 1.1)])
def test_apollos_scale_of_few_numbers_makes_updates_as_noisy_as_advice_says(
    rank: int, ratio: float
) -> None:
    torch.manual_seed(0)
    blocks, block = 20_000, 32
    rule = ApolloRule(beta=0.9, ratio=block / rank, eps=1e-30)
    kept = torch.cat([torch.zeros(1, blocks, 1, rank), torch.ones(1, blocks, 1, rank)], dim=-1)
    place = Place(matrices=slice(0, 1), columns=(0, block))
    for step in range(1, 41):
        now: Any = SimpleNamespace(basis=DenseBasis(), step=step + 40, beta2=0.999)
        gradient = torch.randn(1, blocks, block)
        x = Blocks(elements_ENW=gradient, whole_ENM=gradient.clone())
        _, kept = rule.advance(x, gradient[..., None, :rank].clone(), kept, now, place)
    scale = x.whole_ENM[0, :, 0] / gradient[0, :, 0]
    assert float(scale.square().mean() / scale.mean().square()) == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"kappa": 1000}, 1000, ["reach 23% of each gradient. Set kappa=55,"]),
        ({"kappa": 55}, 1000, []),
        ({"kappa": 1}, 5, ["Raise rank,"]),
        ({"kappa": 1000}, 30_000, []),
        ({"momentum": "flora"}, 10, []),
        ({"momentum": "flora", "rank": 3}, 10, []),
        ({"momentum": "flora", "rank": 2}, 10, ["has 1.4 times the noise"]),
        ({"rank": 3, "kappa": 1}, 100, ["has 1.1 times the noise"]),
        ({"rank": 3, "kappa": 1, "momentum": "flora", "beta1": 0.95}, 10, []),
        ({"momentum": "blend", "rank": 1}, 10, []),
        ({"momentum": "blend", "blend_gain": 2.0}, 10, []),
        ({"momentum": "blend", "blend_gain": 4.0}, 10, ["has 7.4 times the noise"]),
        ({"momentum": "blend", "blend_gain": None, "beta1": 0.999}, 10, []),
        ({"momentum": "ademamix", "blend_gain": 10.0, "rank": 1}, 10, []),
        ({"momentum": "subspace_adam", "rank": 1}, 10, []),
        ({"momentum": "apollo", "rank": 1}, 10, ["Raise rank to 4"]),
        ({"momentum": "apollo", "rank": 2}, 10, []),
        ({"momentum": "vectors", "rank": 1}, 10, []),
        ({"momentum": "none", "rank": 1}, 10, []),
        ({"rank": None}, 10, []),
    ],
    ids=str,
)
def test_advice_names_what_the_run_suffers_from_and_says_nothing_else(
    settings: dict[str, Any], steps: int, words: list[str]
) -> None:
    said = list(advice([_held(**settings)] * 2, steps))
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"lr": 0.05}, ["Pass lr=0.001,"]),
        ({"lr": 0.0, "initial_lr": 0.1}, ["lr=0.1 looks like a relative step"]),
        ({"lr": torch.tensor(0.25)}, ["lr=0.25 "]),
        ({"lr": 0.01}, []),
        ({"lr": 0.05, "scale_parameter": True}, []),
    ],
    ids=str,
)
def test_a_learning_rate_of_the_weights_own_size_is_taken_for_a_relative_one(
    group: dict[str, Any], said: list[str]
) -> None:
    groups = [{"scale_parameter": False, "lr": 1e-3}, {"scale_parameter": False, **group}]
    found = list(advice_on_rate(groups))
    assert len(found) == len(said)
    assert all(word in sentence for word, sentence in zip(said, found, strict=True))


def test_a_run_by_the_suggested_kappa_is_left_in_peace() -> None:
    for steps in (100, 1000, 12345):
        (sentence,) = advice([_held()], steps)
        kappa = int(sentence.partition("Set kappa=")[2].partition(",")[0])
        assert list(advice([_held(kappa=kappa)], steps)) == []


def test_an_optimizer_advises_whoever_asks_and_changes_nothing() -> None:
    weights = runs.build({"w": (4, 64), "frozen": (4, 64)})
    weights["frozen"].requires_grad_(False)
    settings: dict[str, Any] = {"rank": 1, "block": 64, "seed": 0}
    optimizer = Flora(weights.items(), lr=0.05, momentum="flora_strict", **settings)
    said = optimizer.advice(steps=100)
    assert [sentence.partition(" ")[0] for sentence in said] == [
        "momentum='flora_strict'",
        "momentum='flora_strict'",
        "lr=0.05",
    ]
    assert optimizer.advice(steps=100) == said
    assert not optimizer.state
    assert Flora(weights.items(), lr=1e-3).advice(steps=100) == ()
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1; got 0"):
        optimizer.advice(steps=0)
