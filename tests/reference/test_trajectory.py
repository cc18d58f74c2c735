# SPDX-License-Identifier: Apache-2.0
"""The oracle against the golden 4x4 trajectory, a literal second spelling, and its laws."""

import math

import pytest
import torch
from torch import Tensor

from flora_dist.reference import Reference, ReferenceSettings
from tests.reference.runs import (
    F64,
    RULES,
    assert_close,
    gradients_of,
    hadamard_bases,
    momentum_of,
    no_sketch,
    start_of,
    trained,
)

# ---------------------------------------------------------------- the golden 4x4 trajectory

G = torch.tensor([[1, 2, 3, 4], [0, -1, 1, 2], [2, 0, -2, 1], [1, 1, 0, -1]], dtype=F64)
SIGNS = torch.tensor([1, -1, 1, -1], dtype=F64)
GOLDEN_GRADIENTS = [G, G.roll(1, 0) - 1, G.roll(1, 1) * SIGNS, G.T]
A1 = torch.tensor([[1, -1, 1, 1], [1, 1, -1, 1]], dtype=F64) / math.sqrt(2)
A2 = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1]], dtype=F64) / math.sqrt(2)
GOLDEN_M4 = [
    [0.5761994646, -0.1443920318],
    [0.725571699, 0.1719018939],
    [0.0171350994, 0.385341773],
    [-0.1368241056, 0.1624413486],
]
GOLDEN_ROW = {
    "flora": [-0.0804552194, -0.0013426351, -0.0647918037, -0.0081895432],
    "flora_strict": [-0.0909179167, 0.0544658456, -0.0952007536, -0.0427861352],
}


def _golden(rule: str) -> Reference:
    # A1 until t=2, A2 from t=2, A1 from t=4: windows t // 2 are 0, 1, 1, 2.
    return trained(
        torch.zeros(4, 4, dtype=F64),
        GOLDEN_GRADIENTS,
        lambda _name, _matrix, window: (A1, A2, A1)[window],
        momentum=rule,
        transfer="paper",
        kappa=2,
        lr=0.1,
    )


def _literal(rule: str) -> tuple[Tensor, Tensor]:
    """Spell the authors' torch step, or Algorithm 2 over it, on the golden inputs."""
    w, m, a = torch.zeros(4, 4, dtype=F64), torch.zeros(4, 2, dtype=F64), A1
    row, col = torch.zeros(4, 1, dtype=F64), torch.zeros(1, 4, dtype=F64)
    for t, g in enumerate(GOLDEN_GRADIENTS, start=1):
        decay = 1.0 - math.pow(t, -0.8)
        square = g**2 + 1e-30
        row = decay * row + (1 - decay) * square.sum(1, keepdim=True) / 4
        col = decay * col + (1 - decay) * square.sum(0, keepdim=True) / 4
        u = g * (row / row.mean()).rsqrt() * col.rsqrt()
        a_new = {2: A2, 4: A1}.get(t, a)
        if rule == "flora":
            update = 0.1 * u + 0.9 * (m @ a)
        if t in (2, 4):
            m = m @ a @ a_new.T
        m = 0.9 * m + 0.1 * (u @ a_new.T)
        if rule == "flora_strict":
            update = m @ a_new
        a = a_new
        w = w - 0.1 * update / max(1.0, float(update.norm()) / math.sqrt(16))
    return w, m


@pytest.mark.parametrize("rule", ["flora", "flora_strict"])
def test_the_golden_trajectory_is_reproduced(rule: str) -> None:
    reference = _golden(rule)
    # 1e-10: what ten printed decimals can say.
    torch.testing.assert_close(
        reference.weights["w"][0], torch.tensor(GOLDEN_ROW[rule], dtype=F64), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        momentum_of(reference)[:, 0], torch.tensor(GOLDEN_M4, dtype=F64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("rule", ["flora", "flora_strict"])
def test_the_golden_trajectory_equals_a_literal_second_spelling(rule: str) -> None:
    reference = _golden(rule)
    weight, momentum = _literal(rule)
    torch.testing.assert_close(reference.weights["w"], weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(momentum_of(reference)[:, 0], momentum, rtol=0, atol=1e-12)


def test_the_read_out_does_not_change_the_momentum() -> None:
    flora, strict = momentum_of(_golden("flora")), momentum_of(_golden("flora_strict"))
    torch.testing.assert_close(flora, strict, rtol=0, atol=1e-15)


# ---------------------------------------------------------------- rules and windows


def test_the_window_is_the_step_divided_by_kappa() -> None:
    reference = trained(start_of(4, 8), [], hadamard_bases(8, 2), kappa=3)
    seen = []
    for gradient in gradients_of((4, 8), 7):
        reference.step({"w": gradient})
        seen.append((reference.state("w")["step"], reference.state("w")["window"]))
    assert seen == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2)]


def test_an_unreached_kappa_never_resamples() -> None:
    asked = set()
    sketch = hadamard_bases(8, 2)

    def recording(name: str, matrix: int, window: int) -> Tensor | None:
        asked.add((name, matrix, window))
        return sketch(name, matrix, window)

    trained(start_of(4, 8), gradients_of((4, 8), 5), recording, kappa=6)
    assert asked == {("w", 0, 0)}


@pytest.mark.parametrize("rule", ["flora", "flora_strict"])
def test_a_lossless_sketch_equals_dense_momentum(rule: str) -> None:
    # rank = block makes A orthogonal: nothing is lost in compressing or in moving. Strict flora
    # reads after adding, and so does dense momentum; flora's (1-b) X + b M is the same sum.
    gradients = gradients_of((5, 13), 7)
    knobs = {"momentum": rule, "kappa": 3, "lr": 0.1, "clip": 0.2}
    compressed = trained(start_of(5, 13), gradients, hadamard_bases(8, 8), **knobs)
    dense = trained(start_of(5, 13), gradients, no_sketch, **knobs)
    assert_close(compressed.weights, dense.weights)


def test_blend_with_a_lossless_sketch_and_gain_one_equals_dense_momentum() -> None:
    gradients = gradients_of((5, 16), 7)
    knobs = {"momentum": "blend", "blend_gain": 1.0, "kappa": 3, "lr": 0.1, "clip": 0.2}
    compressed = trained(start_of(5, 16), gradients, hadamard_bases(8, 8), **knobs)
    dense = trained(start_of(5, 16), gradients, no_sketch, **knobs)
    assert_close(compressed.weights, dense.weights)


def test_blend_follows_its_formula_across_a_window() -> None:
    sketch, gradients = hadamard_bases(8, 2), gradients_of((3, 8), 2)
    reference = trained(
        torch.zeros(3, 8, dtype=F64),
        gradients,
        sketch,
        momentum="blend",
        blend_gain=2.0,
        kappa=2,
        clip=0.5,
        lr=1.0,
    )
    old, new = sketch("w", 0, 0), sketch("w", 0, 1)
    assert old is not None
    assert new is not None
    xs = []
    for step in (1, 2):
        # "none" at lr 1 from zero weights gives -X clipped.
        alone = trained(
            torch.zeros(3, 8, dtype=F64),
            gradients[:step],
            no_sketch,
            momentum="none",
            lr=1.0,
            clip=0.5,
        )
        before = trained(
            torch.zeros(3, 8, dtype=F64),
            gradients[: step - 1],
            no_sketch,
            momentum="none",
            lr=1.0,
            clip=0.5,
        )
        xs.append(before.weights["w"] - alone.weights["w"])
    m1 = 0.1 * xs[0] @ old.T
    first = xs[0] + 2.0 * (2 / 8) * (m1 - xs[0] @ old.T) @ old
    c2 = xs[1] @ new.T
    m2 = 0.9 * (2 / 8) * m1 @ old @ new.T + 0.1 * c2
    second = xs[1] + 2.0 * (2 / 8) * (m2 - c2) @ new
    assert_close(reference.weights["w"], -first - second)
    assert_close(momentum_of(reference)[:, 0], m2)


@pytest.mark.parametrize(
    ("law", "factor"), [("hadamard", 2 / 8), ("gaussian", 2 / 11), ("rademacher", 2 / 9)]
)
def test_shrink_scales_the_moved_momentum_by_the_least_squares_factor(
    law: str, factor: float
) -> None:
    gradients = [*gradients_of((3, 8), 1), torch.zeros(3, 8, dtype=F64)]
    knobs = {"kappa": 2, "sketch": law}
    paper = trained(start_of(3, 8), gradients, hadamard_bases(8, 2), transfer="paper", **knobs)
    shrunk = trained(start_of(3, 8), gradients, hadamard_bases(8, 2), transfer="shrink", **knobs)
    # X = 0 at step 2, so all of M is what moved.
    assert_close(momentum_of(shrunk), factor * momentum_of(paper))


@pytest.mark.parametrize("rule", ["flora", "flora_strict", "blend"])
def test_reset_leaves_nothing_of_the_old_window(rule: str) -> None:
    zero = torch.zeros(3, 8, dtype=F64)
    knobs = {"momentum": rule, "transfer": "reset", "kappa": 2}
    reference = trained(start_of(3, 8), [*gradients_of((3, 8), 1)], hadamard_bases(8, 2), **knobs)
    assert momentum_of(reference).abs().sum() > 0
    reference.step({"w": zero})
    assert momentum_of(reference).abs().sum() == 0


def test_each_step_reads_the_stored_window_and_writes_its_own() -> None:
    asked: list[int] = []
    sketch = hadamard_bases(8, 2)

    def recording(name: str, matrix: int, window: int) -> Tensor | None:
        asked.append(window)
        return sketch(name, matrix, window)

    reference = trained(start_of(3, 8), [], recording, kappa=2)
    asked.clear()
    for gradient in gradients_of((3, 8), 4):
        reference.step({"w": gradient})
    assert asked == [0, 0, 0, 1, 1, 1, 1, 2]


def test_beta1_zero_makes_flora_plain_adafactor() -> None:
    gradients = gradients_of((3, 16), 4)
    flora = trained(start_of(3, 16), gradients, hadamard_bases(8, 2), beta1=0.0, kappa=2, clip=0.3)
    none = trained(start_of(3, 16), gradients, hadamard_bases(8, 2), momentum="none", clip=0.3)
    assert_close(flora.weights, none.weights)
    assert "momentum" not in none.state("w")


@pytest.mark.parametrize("name", ["momentum", "sketch", "transfer"])
def test_a_misspelt_choice_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        ReferenceSettings(**{name: "flroa"})


# ---------------------------------------------------------------- statistics


def test_a_constant_beta2_equals_adams_bias_corrected_second_moment() -> None:
    gradients = gradients_of((11,), 6)
    reference = trained(
        torch.zeros(11, dtype=F64),
        gradients,
        no_sketch,
        momentum="none",
        beta2=0.95,
        clip=None,
        lr=0.1,
    )
    weight, v = torch.zeros(11, dtype=F64), torch.zeros(11, dtype=F64)
    for t, g in enumerate(gradients, start=1):
        v = 0.95 * v + 0.05 * (g**2 + 1e-12)
        weight = weight - 0.1 * g / (v / (1 - 0.95**t)).sqrt()
    assert_close(reference.weights["w"], weight)


def test_the_default_second_moment_rate_is_one_minus_t_to_minus_four_fifths() -> None:
    gradients = gradients_of((3, 5), 3)
    reference = trained(start_of(3, 5), gradients, no_sketch, momentum="none")
    row, column = torch.zeros(3, dtype=F64), torch.zeros(5, dtype=F64)
    for t, g in enumerate(gradients, start=1):
        row += (g.square().mean(1) - row) * t**-0.8
        column += (g.square().mean(0) - column) * t**-0.8
    state = reference.state("w")
    assert_close([state["row"], state["column"]], [row, column])


def test_a_vector_has_an_eps_of_at_least_1e_minus_12() -> None:
    gradient = torch.full((4,), 1e-6, dtype=F64)
    for eps, floor in ((1e-30, 1e-12), (1e-8, 1e-8)):
        knobs = {"momentum": "none", "clip": None, "lr": 1.0, "eps": eps}
        moved = trained(torch.zeros(4, dtype=F64), [gradient], no_sketch, **knobs).weights["w"]
        assert_close(moved, -gradient / math.sqrt(1e-12 + floor))


def test_a_matrix_has_the_eps_of_the_settings() -> None:
    gradient = torch.full((2, 3), 1e-6, dtype=F64)
    knobs = {"momentum": "none", "clip": None, "lr": 1.0, "eps": 3e-12}
    moved = trained(torch.zeros(2, 3, dtype=F64), [gradient], no_sketch, **knobs).weights["w"]
    assert_close(moved, torch.full_like(moved, -0.5))


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_gradient_in_float32_moves_nothing(rule: str) -> None:
    # An expert without tokens: R C = eps^2 = 1e-60 is zero in float32, and 0 / 0 would spread NaN.
    weight = start_of(3, 8, dtype=torch.float32)
    sketch = hadamard_bases(8, 2, dtype=torch.float32)
    reference = trained(weight, [torch.zeros(3, 8)] * 3, sketch, momentum=rule, kappa=2)
    assert torch.equal(reference.weights["w"], weight)
