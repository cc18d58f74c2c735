# SPDX-License-Identifier: Apache-2.0
"""The oracle against the golden 4x4 trajectory, a literal second spelling, and its laws."""

import math
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flora_dist.reference import Reference, ReferenceSettings, stochastic_round

RULES = ("flora", "flora_strict", "blend", "none")
F64 = torch.float64
Sketch = Callable[[str, int, int], Tensor | None]


def _gradients(shape: tuple[int, ...], steps: int, *, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(shape, generator=generator, dtype=F64) * 3 + 0.1
    draws = [torch.randn(shape, generator=generator, dtype=F64) * scale for _ in range(steps)]
    return [g.to(dtype) for g in draws]


def _hadamard(block: int, rank: int, *, dtype: torch.dtype = F64) -> Sketch:
    """Return rows of a Hadamard matrix with random signs: A A^T = (B/R) I."""
    h = torch.ones(1, 1, dtype=F64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])

    def sketch(name: str, matrix: int, window: int) -> Tensor:
        key = zlib.crc32(f"{name} {matrix} {window}".encode())
        generator = torch.Generator().manual_seed(key)
        rows = torch.randperm(block, generator=generator)[:rank]
        signs = torch.randint(0, 2, (block,), generator=generator) * 2.0 - 1
        return (h[rows] * signs / math.sqrt(rank)).to(dtype)

    return sketch


def _dense(_name: str, _matrix: int, _window: int) -> None:
    return None


def _start(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def _train(weight: Tensor, gradients: list[Tensor], bases: Sketch, **knobs: object) -> Reference:
    settings = ReferenceSettings(**knobs)
    reference = Reference({"w": weight}, sketch=bases, settings=settings)
    for gradient in gradients:
        reference.step({"w": gradient})
    return reference


def _momentum(reference: Reference, name: str = "w") -> Tensor:
    momentum = reference.state(name)["momentum"]
    assert isinstance(momentum, Tensor)
    return momentum


def _close(actual: object, expected: object) -> None:
    # float64 against float64 in another order of operations: a few roundings of 1e-16 per step.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def _equal(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


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
    return _train(
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
        _momentum(reference)[:, 0], torch.tensor(GOLDEN_M4, dtype=F64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("rule", ["flora", "flora_strict"])
def test_the_golden_trajectory_equals_a_literal_second_spelling(rule: str) -> None:
    reference = _golden(rule)
    weight, momentum = _literal(rule)
    torch.testing.assert_close(reference.weights["w"], weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(_momentum(reference)[:, 0], momentum, rtol=0, atol=1e-12)


def test_the_read_out_does_not_change_the_momentum() -> None:
    flora, strict = _momentum(_golden("flora")), _momentum(_golden("flora_strict"))
    torch.testing.assert_close(flora, strict, rtol=0, atol=1e-15)


# ---------------------------------------------------------------- rules and windows


def test_the_window_is_the_step_divided_by_kappa() -> None:
    reference = _train(_start(4, 8), [], _hadamard(8, 2), kappa=3)
    seen = []
    for gradient in _gradients((4, 8), 7):
        reference.step({"w": gradient})
        seen.append((reference.state("w")["step"], reference.state("w")["window"]))
    assert seen == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2)]


def test_an_unreached_kappa_never_resamples() -> None:
    asked = set()
    sketch = _hadamard(8, 2)

    def recording(name: str, matrix: int, window: int) -> Tensor | None:
        asked.add((name, matrix, window))
        return sketch(name, matrix, window)

    _train(_start(4, 8), _gradients((4, 8), 5), recording, kappa=6)
    assert asked == {("w", 0, 0)}


@pytest.mark.parametrize("rule", ["flora", "flora_strict"])
def test_a_lossless_sketch_equals_dense_momentum(rule: str) -> None:
    # rank = block makes A orthogonal: nothing is lost in compressing or in moving. Strict flora
    # reads after adding, and so does dense momentum; flora's (1-b) X + b M is the same sum.
    gradients = _gradients((5, 13), 7)
    knobs = {"momentum": rule, "kappa": 3, "lr": 0.1, "clip": 0.2}
    compressed = _train(_start(5, 13), gradients, _hadamard(8, 8), **knobs)
    dense = _train(_start(5, 13), gradients, _dense, **knobs)
    _close(compressed.weights, dense.weights)


def test_blend_with_a_lossless_sketch_and_gain_one_equals_dense_momentum() -> None:
    gradients = _gradients((5, 16), 7)
    knobs = {"momentum": "blend", "blend_gain": 1.0, "kappa": 3, "lr": 0.1, "clip": 0.2}
    compressed = _train(_start(5, 16), gradients, _hadamard(8, 8), **knobs)
    dense = _train(_start(5, 16), gradients, _dense, **knobs)
    _close(compressed.weights, dense.weights)


def test_blend_follows_its_formula_across_a_window() -> None:
    sketch, gradients = _hadamard(8, 2), _gradients((3, 8), 2)
    reference = _train(
        torch.zeros(3, 8, dtype=F64), gradients, sketch, momentum="blend", kappa=2, clip=0.5, lr=1.0
    )
    old, new = sketch("w", 0, 0), sketch("w", 0, 1)
    assert old is not None
    assert new is not None
    xs = []
    for step in (1, 2):
        # "none" at lr 1 from zero weights gives -X clipped.
        alone = _train(
            torch.zeros(3, 8, dtype=F64),
            gradients[:step],
            _dense,
            momentum="none",
            lr=1.0,
            clip=0.5,
        )
        before = _train(
            torch.zeros(3, 8, dtype=F64),
            gradients[: step - 1],
            _dense,
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
    _close(reference.weights["w"], -first - second)
    _close(_momentum(reference)[:, 0], m2)


@pytest.mark.parametrize(
    ("law", "factor"), [("hadamard", 2 / 8), ("gaussian", 2 / 11), ("rademacher", 2 / 9)]
)
def test_shrink_scales_the_moved_momentum_by_the_least_squares_factor(
    law: str, factor: float
) -> None:
    gradients = [*_gradients((3, 8), 1), torch.zeros(3, 8, dtype=F64)]
    knobs = {"kappa": 2, "sketch": law}
    paper = _train(_start(3, 8), gradients, _hadamard(8, 2), transfer="paper", **knobs)
    shrunk = _train(_start(3, 8), gradients, _hadamard(8, 2), transfer="shrink", **knobs)
    # X = 0 at step 2, so all of M is what moved.
    _close(_momentum(shrunk), factor * _momentum(paper))


@pytest.mark.parametrize("rule", ["flora", "flora_strict", "blend"])
def test_reset_leaves_nothing_of_the_old_window(rule: str) -> None:
    zero = torch.zeros(3, 8, dtype=F64)
    knobs = {"momentum": rule, "transfer": "reset", "kappa": 2}
    reference = _train(_start(3, 8), [*_gradients((3, 8), 1)], _hadamard(8, 2), **knobs)
    assert _momentum(reference).abs().sum() > 0
    reference.step({"w": zero})
    assert _momentum(reference).abs().sum() == 0


def test_each_step_reads_the_stored_window_and_writes_its_own() -> None:
    asked: list[int] = []
    sketch = _hadamard(8, 2)

    def recording(name: str, matrix: int, window: int) -> Tensor | None:
        asked.append(window)
        return sketch(name, matrix, window)

    reference = _train(_start(3, 8), [], recording, kappa=2)
    asked.clear()
    for gradient in _gradients((3, 8), 4):
        reference.step({"w": gradient})
    assert asked == [0, 0, 0, 1, 1, 1, 1, 2]


def test_beta1_zero_makes_flora_plain_adafactor() -> None:
    gradients = _gradients((3, 16), 4)
    flora = _train(_start(3, 16), gradients, _hadamard(8, 2), beta1=0.0, kappa=2, clip=0.3)
    none = _train(_start(3, 16), gradients, _hadamard(8, 2), momentum="none", clip=0.3)
    _close(flora.weights, none.weights)
    assert "momentum" not in none.state("w")


@pytest.mark.parametrize("name", ["momentum", "sketch", "transfer"])
def test_a_misspelt_choice_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        ReferenceSettings(**{name: "flroa"})


# ---------------------------------------------------------------- statistics


def test_a_constant_beta2_equals_adams_bias_corrected_second_moment() -> None:
    gradients = _gradients((11,), 6)
    reference = _train(
        torch.zeros(11, dtype=F64),
        gradients,
        _dense,
        momentum="none",
        beta2=0.95,
        clip=None,
        lr=0.1,
    )
    weight, v = torch.zeros(11, dtype=F64), torch.zeros(11, dtype=F64)
    for t, g in enumerate(gradients, start=1):
        v = 0.95 * v + 0.05 * (g**2 + 1e-12)
        weight = weight - 0.1 * g / (v / (1 - 0.95**t)).sqrt()
    _close(reference.weights["w"], weight)


def test_the_default_second_moment_rate_is_one_minus_t_to_minus_four_fifths() -> None:
    gradients = _gradients((3, 5), 3)
    reference = _train(_start(3, 5), gradients, _dense, momentum="none")
    row, column = torch.zeros(3, dtype=F64), torch.zeros(5, dtype=F64)
    for t, g in enumerate(gradients, start=1):
        row += (g.square().mean(1) - row) * t**-0.8
        column += (g.square().mean(0) - column) * t**-0.8
    state = reference.state("w")
    _close([state["row"], state["column"]], [row, column])


def test_a_vector_has_an_eps_of_at_least_1e_minus_12() -> None:
    gradient = torch.full((4,), 1e-6, dtype=F64)
    for eps, floor in ((1e-30, 1e-12), (1e-8, 1e-8)):
        knobs = {"momentum": "none", "clip": None, "lr": 1.0, "eps": eps}
        moved = _train(torch.zeros(4, dtype=F64), [gradient], _dense, **knobs).weights["w"]
        _close(moved, -gradient / math.sqrt(1e-12 + floor))


def test_a_matrix_has_the_eps_of_the_settings() -> None:
    gradient = torch.full((2, 3), 1e-6, dtype=F64)
    knobs = {"momentum": "none", "clip": None, "lr": 1.0, "eps": 3e-12}
    moved = _train(torch.zeros(2, 3, dtype=F64), [gradient], _dense, **knobs).weights["w"]
    _close(moved, torch.full_like(moved, -0.5))


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_gradient_in_float32_moves_nothing(rule: str) -> None:
    # An expert without tokens: R C = eps^2 = 1e-60 is zero in float32, and 0 / 0 would spread NaN.
    weight = _start(3, 8, dtype=torch.float32)
    sketch = _hadamard(8, 2, dtype=torch.float32)
    reference = _train(weight, [torch.zeros(3, 8)] * 3, sketch, momentum=rule, kappa=2)
    assert torch.equal(reference.weights["w"], weight)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compressed", [True, False])
def test_experts_equal_separate_matrices(rule: str, compressed: bool) -> None:
    gradients, weights, knobs = (
        _gradients((3, 4, 11), 5),
        _start(3, 4, 11),
        {"momentum": rule, "kappa": 2, "lr": 0.1, "clip": 0.4, "scale_parameter": True},
    )
    weights[1] *= 5  # so that a scale, RMS or clip shared by the experts would show
    sketch = _hadamard(8, 2) if compressed else _dense
    batch = _train(weights, gradients, sketch, **knobs)
    for e in range(3):

        def of_expert(name: str, _matrix: int, window: int, e: int = e) -> Tensor | None:
            return sketch(name, e, window)

        alone = _train(weights[e], [g[e] for g in gradients], of_expert, **knobs)
        _close(batch.weights["w"][e], alone.weights["w"])
        for key in {"row", "column", "momentum"} & batch.state("w").keys():
            _close(batch.state("w")[key][e], alone.state("w")[key])


@pytest.mark.parametrize("rule", ["flora", "flora_strict", "blend"])
def test_a_ragged_last_block_equals_a_zero_padded_matrix(rule: str) -> None:
    # Padding the weight itself would change its column means, so X is spelled here: from zero
    # momentum, one step gives M = 0.1 X A^T.
    sketch = _hadamard(8, 2)
    gradient = _gradients((4, 11), 1)[0]
    ragged = _train(_start(4, 11), [gradient], sketch, momentum=rule, clip=None)
    square = gradient.square()
    x = gradient / (torch.outer(square.mean(1), square.mean(0)) / square.mean()).sqrt()
    padded = torch.zeros(4, 16, dtype=F64)
    padded[:, :11] = x
    a = sketch("w", 0, 0)
    assert a is not None
    c = padded.view(4, 2, 8) @ a.T
    _close(_momentum(ragged), 0.1 * c)
    expanded = ((c @ a).reshape(4, 16))[:, :11]
    update = {
        "flora": 0.1 * x,
        "flora_strict": 0.1 * expanded,
        "blend": x - 2.0 * (2 / 8) * 0.9 * expanded,
    }[rule]
    moved = (_start(4, 11) - ragged.weights["w"]) / 1e-3
    # lr = 1e-3 takes three digits off the movement.
    torch.testing.assert_close(moved, update, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_convolution_equals_its_flattened_matrix(rule: str, compressed: bool) -> None:
    weight, gradients = _start(6, 2, 3, 3), _gradients((6, 2, 3, 3), 4)
    sketch = _hadamard(8, 2) if compressed else _dense
    knobs = {"momentum": rule, "kappa": 2, "lr": 0.1, "clip": 0.4}
    conv = _train(weight, gradients, sketch, **knobs)
    flat = _train(weight.flatten(1), [g.flatten(1) for g in gradients], sketch, **knobs)
    assert conv.weights["w"].shape == weight.shape
    _equal(conv.weights["w"].flatten(1), flat.weights["w"])
    _equal(conv.state("w"), flat.state("w"))


def test_state_has_the_documented_shapes() -> None:
    weights = {
        "matrix": _start(5, 19),
        "experts": _start(3, 5, 19),
        "bias": _start(7),
        "gain": _start(),
    }
    reference = Reference(weights, sketch=_hadamard(8, 2), settings=ReferenceSettings())
    dense = Reference(weights, sketch=_dense, settings=ReferenceSettings())
    reference.step(weights)
    dense.step(weights)

    def shapes(of: Reference, name: str) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v.shape) for k, v in of.state(name).items() if isinstance(v, Tensor)}

    assert shapes(reference, "matrix") == {"row": (5,), "column": (19,), "momentum": (5, 3, 2)}
    assert shapes(reference, "experts") == {
        "row": (3, 5),
        "column": (3, 19),
        "momentum": (3, 5, 3, 2),
    }
    assert shapes(reference, "bias") == {"second": (7,), "momentum": (7,)}
    assert shapes(reference, "gain") == {"second": (), "momentum": ()}
    assert shapes(dense, "experts") == {"row": (3, 5), "column": (3, 19), "momentum": (3, 5, 19)}


def test_state_and_weights_are_copies() -> None:
    weight = _start(3, 8)
    reference = _train(weight, _gradients((3, 8), 1), _hadamard(8, 2))
    assert torch.equal(weight, _start(3, 8))
    _momentum(reference).zero_()
    assert _momentum(reference).abs().sum() > 0


# ---------------------------------------------------------------- the step around the rule


def test_a_skipped_parameter_does_not_advance() -> None:
    gradients = {"a": _gradients((3, 8), 3), "b": _gradients((4, 8), 3)}
    both = Reference(
        {"a": _start(3, 8), "b": _start(4, 8)},
        sketch=_hadamard(8, 2),
        settings=ReferenceSettings(kappa=2, lr=0.1, weight_decay=0.1),
    )
    both.step({"a": gradients["a"][0], "b": gradients["b"][0]})
    both.step({"a": None, "b": gradients["b"][1]})
    both.step({"b": gradients["b"][2]})
    both.step({"a": gradients["a"][1]})
    for name, steps in (("a", 2), ("b", 3)):
        alone = Reference(
            {name: both.weights[name] * 0 + _start(*both.weights[name].shape)},
            sketch=_hadamard(8, 2),
            settings=ReferenceSettings(kappa=2, lr=0.1, weight_decay=0.1),
        )
        for gradient in gradients[name][:steps]:
            alone.step({name: gradient})
        assert torch.equal(both.weights[name], alone.weights[name])
        assert both.state(name)["step"] == steps
        _equal(both.state(name), alone.state(name))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compressed", [True, False])
def test_clip_bounds_what_each_rule_says(rule: str, compressed: bool) -> None:
    # flora and strict bound U, none and blend bound X: at step 1 dense blend has U = 0.1 X.
    sketch = _hadamard(8, 8) if compressed else _dense
    knobs = {"momentum": rule, "lr": 1.0, "blend_gain": 1.0}
    start, gradients = torch.zeros(6, 16, dtype=F64), _gradients((6, 16), 1)
    free = -_train(start, gradients, sketch, clip=None, **knobs).weights["w"]
    held = -_train(start, gradients, sketch, clip=0.01, **knobs).weights["w"]
    size = {"blend": 0.1 * 0.01}.get(rule, 0.01)
    assert float(free.square().mean().sqrt()) > 0.05
    _close(held, free / free.square().mean().sqrt() * size)
    loose = -_train(start, gradients, sketch, clip=100.0, **knobs).weights["w"]
    assert torch.equal(loose, free)


@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (9,)])
def test_weight_decay_is_decoupled(shape: tuple[int, ...]) -> None:
    gradients = _gradients(shape, 1)
    plain = _train(_start(*shape), gradients, _hadamard(8, 2), lr=0.1)
    decayed = _train(_start(*shape), gradients, _hadamard(8, 2), lr=0.1, weight_decay=0.5)
    _close(decayed.weights["w"], plain.weights["w"] - 0.1 * 0.5 * _start(*shape))
    tensors = {"row", "column", "momentum", "second"} & plain.state("w").keys()
    for key in tensors:
        _equal(decayed.state("w")[key], plain.state("w")[key])


@pytest.mark.parametrize("shape", [(4, 8), (9,)])
def test_scale_parameter_multiplies_the_step_by_the_rms_of_the_weight(
    shape: tuple[int, ...],
) -> None:
    gradients = _gradients(shape, 1)
    for start in (_start(*shape), 1e-5 * _start(*shape)):
        scale = max(1e-3, float(start.square().mean().sqrt()))
        knobs = {"lr": 0.1, "weight_decay": 0.5}
        scaled = _train(start, gradients, _hadamard(8, 2), scale_parameter=True, **knobs)
        plain = _train(start, gradients, _hadamard(8, 2), **knobs)
        kept = (1 - 0.1 * 0.5) * start
        torch.testing.assert_close(
            scaled.weights["w"] - kept, scale * (plain.weights["w"] - kept), rtol=1e-10, atol=1e-15
        )


def test_maximize_negates_the_gradient() -> None:
    gradients = _gradients((4, 8), 3)
    up = _train(_start(4, 8), gradients, _hadamard(8, 2), maximize=True)
    down = _train(_start(4, 8), [-g for g in gradients], _hadamard(8, 2))
    assert torch.equal(up.weights["w"], down.weights["w"])


def test_weights_may_be_trained_in_place_by_autograd() -> None:
    reference = _train(_start(4, 8), [], _hadamard(8, 2))
    weight = reference.weights["w"].requires_grad_()
    weight.square().sum().backward()
    reference.step({"w": weight.grad})
    assert reference.weights["w"] is weight
    assert weight.is_leaf
    assert not torch.equal(weight, _start(4, 8))


def test_settings_and_sketches_may_differ_by_name() -> None:
    weights = {"a": _start(4, 8), "b": _start(4, 8)}
    reference = Reference(
        weights,
        sketch=lambda name, matrix, window: (
            _hadamard(8, 2)(name, matrix, window) if name == "a" else None
        ),
        settings=lambda name: ReferenceSettings(lr=0.0 if name == "a" else 0.1),
    )
    reference.step(weights)
    assert torch.equal(reference.weights["a"], weights["a"])
    assert not torch.equal(reference.weights["b"], weights["b"])
    assert _momentum(reference, "a").shape == (4, 1, 2)
    assert _momentum(reference, "b").shape == (4, 8)


# ---------------------------------------------------------------- low precision


def _bits(name: str, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
    key = zlib.crc32(f"{name} {purpose} {step} {shape}".encode())
    return torch.randint(0, 65536, shape, generator=torch.Generator().manual_seed(key))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (4, 2, 2, 2), (9,), ()])
@pytest.mark.parametrize("stochastic", [True, False])
def test_low_precision_weights_stay_within_one_spacing_of_float32(
    dtype: torch.dtype, shape: tuple[int, ...], stochastic: bool
) -> None:
    weight, gradients = _start(*shape, dtype=dtype), _gradients(shape, 1, dtype=dtype)
    low = Reference(
        {"w": weight},
        sketch=_hadamard(8, 2, dtype=torch.float32),
        settings=ReferenceSettings(lr=0.1, stochastic_rounding=stochastic),
        bits=_bits if stochastic else None,
    )
    low.step({"w": gradients[0]})
    exact = _train(
        weight.float(), [gradients[0].float()], _hadamard(8, 2, dtype=torch.float32), lr=0.1
    ).weights["w"]
    got = low.weights["w"]
    assert got.dtype == dtype
    spacing = torch.finfo(dtype).eps * 2 ** exact.abs().log2().floor()
    error = (got.float() - exact).abs()
    assert bool((error <= (1.0 if stochastic else 0.5) * spacing).all())
    # The state is float32, bit for bit that of the float32 weight.
    want = _train(weight.float(), [gradients[0].float()], _hadamard(8, 2, dtype=torch.float32))
    _equal(low.state("w"), want.state("w"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.003, -0.37, 1e-4, 2.5e-7, -3e-6, 1.999, 0.0])
def test_stochastic_rounding_is_unbiased_between_two_neighbours(
    dtype: torch.dtype, value: float
) -> None:
    x = torch.full((65536,), value)
    rounded = stochastic_round(x, dtype, torch.arange(65536)).double()
    info = torch.finfo(dtype)
    exponent = 2.0 ** math.floor(math.log2(abs(value))) if value else 0.0
    spacing = info.eps * max(exponent, info.smallest_normal)
    exact = float(x[0])
    assert float((rounded - exact).abs().max()) < spacing
    # All 65536 values of u, each once: the mean is exact to the resolution of u.
    assert abs(float(rounded.mean()) - exact) <= spacing / 65536


def test_stochastic_rounding_leaves_what_the_dtype_can_hold() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = stochastic_round(every.float(), torch.bfloat16, torch.full((65536,), 65535))
    assert torch.equal(rounded.nan_to_num(nan=7.0), every.nan_to_num(nan=7.0))
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    rounded = stochastic_round(halves.float(), torch.float16, torch.full((65536,), 65535))
    assert torch.equal(rounded.nan_to_num(nan=7.0), halves.nan_to_num(nan=7.0))


def test_zero_bits_round_towards_zero() -> None:
    x = torch.tensor([1.0039, -1.0039, 1e-40, float("inf"), -float("inf")])
    rounded = stochastic_round(x, torch.bfloat16, torch.zeros(5, dtype=torch.int64))
    assert rounded.tolist()[:2] == [1.0, -1.0]
    assert 0 < rounded[2] <= x[2]
    assert rounded.tolist()[3:] == [float("inf"), -float("inf")]


def test_missing_bits_are_an_error() -> None:
    weight = _start(4, 8, dtype=torch.bfloat16)
    sketch = _hadamard(8, 2, dtype=torch.float32)
    reference = Reference({"w": weight}, sketch=sketch, settings=ReferenceSettings())
    with pytest.raises(ValueError, match="bits must be given: 'w' rounds its weight"):
        reference.step({"w": weight})


@pytest.mark.parametrize("rule", ["flora", "flora_strict", "blend"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 8)])
def test_bf16_momentum_is_rounded_after_the_update_used_it(
    rule: str, compressed: bool, shape: tuple[int, ...]
) -> None:
    sketch = _hadamard(8, 2, dtype=torch.float32) if compressed else _dense
    weight = _start(*shape, dtype=torch.float32)
    gradients = _gradients(shape, 2, dtype=torch.float32)
    asked: list[tuple[str, str, int, tuple[int, ...]]] = []

    def bits(name: str, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
        asked.append((name, purpose, step, shape))
        return _bits(name, purpose, step, shape)

    settings = ReferenceSettings(momentum=rule, state_dtype=torch.bfloat16)
    low = Reference({"w": weight}, sketch=sketch, settings=settings, bits=bits)
    exact = _train(weight, gradients[:1], sketch, momentum=rule)
    low.step({"w": gradients[0]})
    # M starts at zero, so the first step's weights and new M know no rounding.
    assert torch.equal(low.weights["w"], exact.weights["w"])
    momentum = _momentum(exact)
    want = stochastic_round(
        momentum, torch.bfloat16, _bits("w", "momentum", 1, tuple(momentum.shape))
    )
    assert _momentum(low).dtype == torch.bfloat16
    assert torch.equal(_momentum(low), want)
    low.step({"w": gradients[1]})
    assert asked == [("w", "momentum", step, tuple(momentum.shape)) for step in (1, 2)]


def test_bf16_momentum_rounds_to_nearest_without_stochastic_rounding() -> None:
    weight, sketch = _start(4, 8, dtype=torch.float32), _hadamard(8, 2, dtype=torch.float32)
    gradients = _gradients((4, 8), 1, dtype=torch.float32)
    knobs = {"state_dtype": torch.bfloat16, "stochastic_rounding": False}
    low = _train(weight, gradients, sketch, **knobs)
    exact = _train(weight, gradients, sketch)
    assert torch.equal(_momentum(low), _momentum(exact).bfloat16())
