# SPDX-License-Identifier: Apache-2.0
"""Advice before a run: both formulas against what the sketches do, and when it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flora_dist.core.parameters.advice import advice, advice_on_rate, coverage, noise_of_momentum
from flora_dist.core.sketch.matrices import sketch_matrix
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry, geometry_of

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


@pytest.mark.parametrize("kind", ["hadamard", "gaussian", "rademacher"])
def test_the_noise_of_a_sketched_average_is_the_formula_over_independent_gradients(
    kind: str,
) -> None:
    size, config = _held(sketch=kind, rank=4, beta1=0.5)
    torch.manual_seed(0)
    ratios = []
    for draw in range(DRAWS):
        gradients = torch.randn(12, 64, dtype=torch.float64)  # 0.5^12 of the first is left
        weights = 0.5 * 0.5 ** torch.arange(12.0, dtype=torch.float64)
        sketch = _matrix(kind, 4, draw)
        average = (weights @ gradients) @ sketch.T @ sketch
        ratios.append(average.square().sum() / 64)
    found = torch.stack(ratios)
    error = float(found.std()) / DRAWS**0.5
    assert abs(float(found.mean()) - noise_of_momentum(size, config)) < 4 * error
    assert 4 * error < 0.2 * float(found.mean())


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"kappa": 1000}, 1000, ["reach 23% of each gradient. Set kappa=55,"]),
        ({"kappa": 55}, 1000, []),
        ({"kappa": 1}, 5, ["Raise rank,"]),
        ({"kappa": 1000}, 30_000, []),
        ({"momentum": "flora"}, 10, []),
        ({"momentum": "flora", "rank": 3}, 10, ["has 1.1 times the noise"]),
        ({"rank": 3, "kappa": 1, "momentum": "flora", "beta1": 0.95}, 10, []),
        ({"momentum": "blend", "rank": 1}, 10, []),
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
