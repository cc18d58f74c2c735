# SPDX-License-Identifier: Apache-2.0
"""Rules and presets of other papers against their formulas, spelt out in plain torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.core.sketch import matrices
from flora_dist.core.sketch.ops import Blocks
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import geometry_of
from flora_dist.core.step import basis, matrix, momentum_rules
from flora_dist.core.step.basis import DenseBasis, Place, SketchedBasis
from flora_dist.core.step.momentum_rules import AdEMAMixRule, SubspaceAdamRule
from flora_dist.core.step.rates import corrected
from tests.battery.oracle import Case, distances, reference_of, sketches
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
    now: Any = SimpleNamespace(basis=DenseBasis())
    place = Place(matrices=slice(0, 1), columns=(0, 4))
    torch.manual_seed(0)
    theirs, momentum = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
    for _ in range(STEPS):
        gradient = torch.randn(1, 1, 4, dtype=torch.float64)
        theirs = beta * theirs + gradient
        x = Blocks(elements_ENW=gradient.clone(), whole_ENM=gradient)
        update, momentum = rule.advance(x, gradient, momentum, now, place)
        torch.testing.assert_close(alpha * update, theirs + alpha * gradient)


def _apollo_step(
    weight: Tensor, gradient: Tensor, kept: dict[str, Any], sketch: Tensor, step: int
) -> Tensor:
    """APOLLO (arXiv 2412.05270, Algorithm 1) of a matrix that is not wider than high."""
    r = gradient @ sketch.T
    kept["m"] = 0.9 * kept.get("m", 0.0) + 0.1 * r
    kept["v"] = 0.999 * kept.get("v", 0.0) + 0.001 * r.square()
    adam = kept["m"] / (1 - 0.9**step) / (kept["v"] / (1 - 0.999**step)).sqrt()
    update = gradient * (adam.norm(dim=1) / r.norm(dim=1)).unsqueeze(1)
    if "size" in kept:
        update = update * min(1.0, 1.01 * kept["size"] / update.norm())
    kept["size"] = update.norm()
    return weight - LR * update


def test_apollo_is_its_formula_where_a_block_is_a_row() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    expected, kept = weight.detach().clone(), dict[str, Any]()
    config = FloraConfig(rank=2, block="full", sketch="gaussian", momentum="apollo")
    sketch = sketches(config, {"w": (12, 8)}, torch.float64)("w", 0, 0)
    assert sketch is not None
    ours = LR / (8 / 2) ** 0.5  # Adam's
    optimizer = Flora.apollo([("w", weight)], ours, rank=2, block="full", sketch="gaussian")
    for step in range(1, STEPS + 1):
        weight.grad = torch.randn_like(weight)
        expected = _apollo_step(expected, weight.grad, kept, sketch, step)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-11)
    assert optimizer.state[weight]["momentum"].shape == (12, 1, 4)


def test_a_sketch_that_misses_a_gradient_does_not_make_it_huge() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(1, 8, dtype=torch.float64))
    config = FloraConfig(rank=1, block=8, momentum="apollo")
    sketch = sketches(config, {"w": (1, 8)}, torch.float64)("w", 0, 0)
    assert sketch is not None
    optimizer = Flora.apollo([("w", weight)], 1.0, rank=1, block=8, beta1=0.0, growth=None)
    for unseen in (False, True):
        before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
        if unseen:  # signs of which half are those of the sketch
            weight.grad[0] = sketch[0].sign() * torch.tensor([1.0, -1.0] * 4)
            weight.grad[0, 0] *= 1.001
        optimizer.step()
        # Adam's step of the gradient's size is 1 per element; beta1 = 0 makes it c / |c|.
        assert (weight.detach() - before).abs().max() < 30


def test_rows_without_a_gradient_stay_and_nothing_is_divided_by_zero() -> None:
    weight = nn.Parameter(torch.ones(4, 8))
    optimizer = Flora.apollo([("w", weight)], LR, rank=2, block=8)
    for used in (slice(0, 4), slice(0, 2), slice(0, 4)):  # rows 2 and 3 pause
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        weight.grad[used] = torch.randn(4, 8)[used]
        optimizer.step()
        moved = (weight.detach() - before).abs().sum(1) > 0
        assert moved.tolist() == [row in range(4)[used] for row in range(4)]
        assert bool(weight.isfinite().all())


def test_adam_in_the_whole_space_is_adam_of_the_normalised_gradient() -> None:
    """Rank = block: nothing is outside, and gain 1 leaves Adam's step in another basis."""
    rule = SubspaceAdamRule(beta=0.9, gain=1.0, ratio=1.0, eps=0.0)
    sketch = matrices.sketch_matrix(
        "hadamard", key=5, rank=8, block=8, dtype=torch.float64, device="cpu"
    ).unsqueeze(0)
    turned = SketchedBasis(old_ERB=sketch, new_ERB=sketch, scale=None, gain=1.0)
    place, kept = Place(matrices=slice(0, 1), columns=(0, 8)), torch.zeros(1, 3, 1, 16).double()
    weight = nn.Parameter(torch.zeros(3, 8, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.99), eps=0.0)
    for step in range(1, STEPS + 1):
        gradient = torch.randn(1, 3, 8, dtype=torch.float64)
        weight.grad = gradient[0] @ sketch[0].T
        before = weight.detach().clone()
        adam.step()
        now: Any = SimpleNamespace(basis=turned, step=step, beta2=corrected(0.99, step))
        x = Blocks(elements_ENW=gradient.clone(), whole_ENM=gradient.clone())
        x = Blocks(elements_ENW=x.whole_ENM, whole_ENM=x.whole_ENM)
        c = turned.compress(x, place)
        update, kept = rule.advance(x, c, kept, now, place)
        torch.testing.assert_close(update[0], (before - weight.detach()) @ sketch[0])


def test_a_new_window_leaves_second_moments_their_mean() -> None:
    second = torch.rand(1, 2, 3, 4)
    sketch = torch.zeros(1, 4, 8)
    there, here = (
        SketchedBasis(old_ERB=sketch, new_ERB=sketch, scale=scale, gain=0.5).spread(second)
        for scale in (None, 0.0)
    )
    assert torch.equal(there, second)
    torch.testing.assert_close(here, second.mean(-1, keepdim=True).expand(1, 2, 3, 4))


@pytest.mark.parametrize("momentum", ["apollo", "subspace_adam"])
def test_what_second_moments_in_the_sketch_cannot_have_is_refused(momentum: str) -> None:
    with pytest.raises(ValueError, match=r"second moments.*state_bits=8\. Pass state_bits=16"):
        Flora(_model().named_parameters(), momentum=momentum, state_bits=8)
    with pytest.raises(ValueError, match=r"of its own; got normalise='rows'\. Leave it"):
        Flora(_model().named_parameters(), momentum=momentum, normalise="rows")
    with pytest.raises(ValueError, match=r"of its own; got normalise='racs'\. Leave it"):
        Flora(_model().named_parameters(), momentum=momentum, normalise="racs")
    rounded = {"state_bits": 16, "stochastic_rounding": False}
    with pytest.raises(ValueError, match=r"bfloat16 needs stochastic_rounding=True"):
        Flora(_model().named_parameters(), momentum=momentum, **rounded)


@pytest.mark.parametrize(("rank", "is_dense"), [(16, False), (32, True)])
def test_two_moments_of_half_of_the_numbers_would_not_halve(rank: int, *, is_dense: bool) -> None:
    size = geometry_of("w", (256, 256), FloraConfig(momentum="apollo", rank=rank, block=64))
    assert (size.rank is None) == is_dense
    assert not is_dense or "and 2 moments would not halve" in size.dense_because


def test_numbers_that_are_zero_but_for_rounding_are_not_made_steps_of() -> None:
    """One row: X is 1 or -1 everywhere at first, and many sums of its signs cancel exactly."""
    torch.manual_seed(0)
    gradients = [torch.randn(1, 4096, dtype=torch.float64) for _ in range(STEPS)]
    found = []
    for dtype in (torch.float64, torch.float32):
        weight = nn.Parameter(torch.zeros(1, 4096, dtype=dtype))
        optimizer = Flora([("w", weight)], lr=1.0, momentum="subspace_adam")
        for gradient in gradients:
            weight.grad = gradient.to(dtype)
            optimizer.step()
        found.append(weight.detach().double())
    # Errors of 1e-7 of the gradient over the least root of 1e-4; with 1e-12 it is 8e-3.
    assert (found[1] - found[0]).norm() < 2e-4 * found[0].norm()


def _five_times(squares: Tensor) -> tuple[Tensor, Tensor]:
    """RACS (arXiv 2502.07752, Algorithm 1): what rows and columns of G^2 are divided by."""
    q = torch.ones(squares.shape[0], dtype=squares.dtype)
    for _ in range(5):
        s = q @ squares / q.square().sum()
        q = squares @ s / s.square().sum()
    return q, s


def test_a_turn_at_each_step_comes_to_where_racs_comes_by_five_turns() -> None:
    """A gradient that stays: G^2 whose first singular values are far apart, so that five do."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(6, 16, dtype=torch.float64))
    sizes = torch.rand(6, 1).double() @ torch.rand(1, 16).double()
    gradient = sizes * (1 + 0.1 * torch.randn(6, 16).double()) * torch.randn(6, 16).sign().double()
    q, s = _five_times(gradient.square())
    by_adafactor = (
        gradient
        / (
            gradient.square().mean(1, keepdim=True)
            * gradient.square().mean(0)
            / gradient.square().mean()
        ).sqrt()
    )
    expected = gradient / (q.unsqueeze(1) * s).sqrt()
    optimizer = Flora.racs([("w", weight)], LR, beta2=0.0)
    for _ in range(20):
        before, weight.grad = weight.detach().clone(), gradient.clone()
        optimizer.step()
    update = (before - weight.detach()) / LR
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-6)
    assert (by_adafactor - expected).abs().max() > 1e-3
    report = optimizer.report()
    assert "no momentum, rows and columns scaled" in str(report)
    assert report.state_bytes == 8 * (6 + 16 + 1)


def test_rows_and_columns_that_nothing_ties_to_the_others_keep_bounded_updates() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(6, 16))
    optimizer = Flora.racs([("w", weight)], LR, growth=None)
    for _ in range(400):
        before, weight.grad = weight.detach().clone(), torch.zeros(6, 16)
        weight.grad[:4, :8] = torch.randn(4, 8)
        weight.grad[4:, 8:] = 0.3 * torch.randn(2, 8)
        optimizer.step()
    update = (before - weight.detach()) / LR
    assert 0.1 < update[:4].square().mean().sqrt() < 10
    # A hundredth in rows and in columns, and a third of the size: about 1e3; unweighed, infinite.
    assert update[4:].abs().max() < 1e4


def test_rows_that_never_had_a_gradient_weigh_nothing_and_learn_when_they_have_one() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4, 8))
    optimizer = Flora.racs([("w", weight)], LR, growth=None)
    for used in (2, 2, 4):
        before, weight.grad = weight.detach().clone(), torch.zeros(4, 8)
        weight.grad[:used] = 1e-12 * torch.randn(used, 8)  # G^4 is no float32
        optimizer.step()
        moved = (weight.detach() - before).abs().sum(1) > 0
        assert moved.tolist() == [row < used for row in range(4)]
        assert bool(weight.isfinite().all())


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


@pytest.mark.parametrize("momentum", ["apollo", "subspace_adam"])
@pytest.mark.parametrize("fault", ["second moments stay", "first moments not corrected"])
def test_a_broken_adam_in_the_sketch_is_noticed(
    momentum: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _distance(momentum=momentum, state_dtype="bfloat16") < 1e-11
    if fault == "second moments stay":
        monkeypatch.setattr(SketchedBasis, "spread", lambda _, second: second)
    else:
        monkeypatch.setattr(momentum_rules, "corrected", lambda beta, _: beta)
    assert _distance(momentum=momentum, state_dtype="bfloat16") > 1e-6


def test_an_average_of_another_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _distance(momentum="ademamix", blend_gain=3.0) < 1e-11
    right = basis.SketchedBasis.add_
    monkeypatch.setattr(
        basis.SketchedBasis,
        "add_",
        lambda self, x, new, place, *, gain: right(self, x, new, place, gain=0.9 * gain),
    )
    assert _distance(momentum="ademamix", blend_gain=3.0) > 1e-6
