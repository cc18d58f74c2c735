# SPDX-License-Identifier: Apache-2.0
"""Rules and presets of other papers against their formulas, spelt out in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.core.sketch.ops import Blocks
from flora_dist.core.step import basis, matrix
from flora_dist.core.step.basis import DenseBasis, Place
from flora_dist.core.step.momentum_rules import AdEMAMixRule
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs

STEPS, LR = 6, 0.01


def _model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(12, 8),
            "mlp": nn.Linear(8, 6),
            "lm_head": nn.Linear(6, 12, bias=False),
        }
    ).double()


def _scale_step(
    weight: Tensor, gradient: Tensor, kept: dict[str, Any], name: str, step: int
) -> Tensor:
    """SCALE (arXiv 2506.16659): a matrix's outputs have a norm of one; the head has momentum."""
    if weight.ndim == 1:
        kept["v"] = 0.999 * kept.get("v", 0.0) + 0.001 * gradient.square()
        x = gradient / (kept["v"] / (1 - 0.999**step)).sqrt()
        kept["m"] = 0.9 * kept.get("m", 0.0) + 0.1 * x
        return weight - LR * kept["m"]
    outputs = 0 if name == "embed_tokens.weight" else 1
    x = gradient / gradient.square().mean(outputs, keepdim=True).sqrt()
    if name == "lm_head.weight":
        kept["m"] = 0.9 * kept.get("m", 0.0) + 0.1 * x
        x = kept["m"]
    return weight - LR * x


def test_scale_is_its_formula_on_embedding_layer_head_and_bias() -> None:
    named = dict(_model().named_parameters())
    expected = {name: weight.detach().clone() for name, weight in named.items()}
    kept: dict[str, dict[str, Any]] = {name: {} for name in named}
    optimizer = Flora.scale(named.items(), LR)
    for step in range(1, STEPS + 1):
        for name, weight in named.items():
            weight.grad = torch.randn_like(weight)
            expected[name] = _scale_step(expected[name], weight.grad, kept[name], name, step)
        optimizer.step()
    for name, weight in named.items():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=0, atol=1e-9)
    moving = [n for n, weight in named.items() if "momentum" in optimizer.state[weight]]
    assert moving == ["mlp.bias", "lm_head.weight"]


def test_scale_without_names_is_refused_since_the_head_is_known_by_its_own() -> None:
    with pytest.raises(ValueError, match="roles are known by names"):
        Flora.scale(_model().parameters())


def test_an_added_average_is_simplified_ademamix_times_its_weight_of_the_gradient() -> None:
    """Theirs: m <- b m + g, U = m + a g; here gain = 1 / (a (1 - b)) and U is a-th of it."""
    beta, alpha = 0.99, 5.0
    rule = AdEMAMixRule(beta=beta, gain=1 / (alpha * (1 - beta)))
    place = Place(matrices=slice(0, 1), columns=(0, 4))
    torch.manual_seed(0)
    theirs, momentum = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
    for _ in range(STEPS):
        gradient = torch.randn(1, 1, 4, dtype=torch.float64)
        theirs = beta * theirs + gradient
        x = Blocks(elements_ENW=gradient.clone(), whole_ENM=gradient)
        update, momentum = rule.advance(x, gradient, momentum, DenseBasis(), place)
        torch.testing.assert_close(alpha * update, theirs + alpha * gradient)


def _distance(**settings: Any) -> float:
    weights = runs.build()
    start, settings = runs.values(weights), {**runs.SETTINGS, **settings}
    optimizer = Flora(weights.items(), **settings)
    oracle = reference_of(Case(settings=settings), start)
    for step in range(STEPS):
        runs.set_gradients(weights, step)
        oracle.step({name: weight.grad for name, weight in weights.items()})
        optimizer.step()
    return distances(start, dict(oracle.weights), runs.values(weights))[1]


@pytest.mark.parametrize("normalise", ["rows", "columns"])
@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend", "none"])
def test_every_rule_clips_what_rows_and_columns_normalise(momentum: str, normalise: str) -> None:
    assert _distance(momentum=momentum, normalise=normalise, clip=0.1) < 1e-11


def test_columns_that_are_divided_by_rows_too_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "row_scale", lambda _, row_EN: row_EN.rsqrt())
    assert _distance(momentum="none", normalise="columns") > 1e-3


def test_an_average_of_another_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _distance(momentum="ademamix", blend_gain=3.0) < 1e-11
    right = basis.SketchedBasis.add_
    monkeypatch.setattr(
        basis.SketchedBasis,
        "add_",
        lambda self, x, new, place, *, gain: right(self, x, new, place, gain=0.9 * gain),
    )
    assert _distance(momentum="ademamix", blend_gain=3.0) > 1e-6
