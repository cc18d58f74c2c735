# SPDX-License-Identifier: Apache-2.0
"""The oracle on every shape, and the step around the rule."""

import pytest
import torch
from torch import Tensor

from flora_dist.reference import Reference, ReferenceSettings
from tests.reference.runs import (
    F64,
    RULES,
    assert_close,
    assert_equal,
    gradients_of,
    hadamard_bases,
    momentum_of,
    no_sketch,
    start_of,
    trained,
)

# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compressed", [True, False])
def test_experts_equal_separate_matrices(rule: str, compressed: bool) -> None:
    gradients, weights, knobs = (
        gradients_of((3, 4, 11), 5),
        start_of(3, 4, 11),
        {"momentum": rule, "kappa": 2, "lr": 0.1, "clip": 0.4, "scale_parameter": True},
    )
    weights[1] *= 5  # so that a scale, RMS or clip shared by the experts would show
    sketch = hadamard_bases(8, 2) if compressed else no_sketch
    batch = trained(weights, gradients, sketch, **knobs)
    for e in range(3):

        def of_expert(name: str, _matrix: int, window: int, e: int = e) -> Tensor | None:
            return sketch(name, e, window)

        alone = trained(weights[e], [g[e] for g in gradients], of_expert, **knobs)
        assert_close(batch.weights["w"][e], alone.weights["w"])
        for key in {"row", "column", "momentum"} & batch.state("w").keys():
            assert_close(batch.state("w")[key][e], alone.state("w")[key])


@pytest.mark.parametrize("rule", ["flora", "flora_strict", "blend"])
def test_a_ragged_last_block_equals_a_zero_padded_matrix(rule: str) -> None:
    # Padding the weight itself would change its column means, so X is spelled here: from zero
    # momentum, one step gives M = 0.1 X A^T.
    sketch = hadamard_bases(8, 2)
    gradient = gradients_of((4, 11), 1)[0]
    ragged = trained(start_of(4, 11), [gradient], sketch, momentum=rule, blend_gain=2.0, clip=None)
    square = gradient.square()
    x = gradient / (torch.outer(square.mean(1), square.mean(0)) / square.mean()).sqrt()
    padded = torch.zeros(4, 16, dtype=F64)
    padded[:, :11] = x
    a = sketch("w", 0, 0)
    assert a is not None
    c = padded.view(4, 2, 8) @ a.T
    assert_close(momentum_of(ragged), 0.1 * c)
    expanded = ((c @ a).reshape(4, 16))[:, :11]
    update = {
        "flora": 0.1 * x,
        "flora_strict": 0.1 * expanded,
        "blend": x - 2.0 * (2 / 8) * 0.9 * expanded,
    }[rule]
    moved = (start_of(4, 11) - ragged.weights["w"]) / 1e-3
    # lr = 1e-3 takes three digits off the movement.
    torch.testing.assert_close(moved, update, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_convolution_equals_its_flattened_matrix(rule: str, compressed: bool) -> None:
    weight, gradients = start_of(6, 2, 3, 3), gradients_of((6, 2, 3, 3), 4)
    sketch = hadamard_bases(8, 2) if compressed else no_sketch
    knobs = {"momentum": rule, "kappa": 2, "lr": 0.1, "clip": 0.4}
    conv = trained(weight, gradients, sketch, **knobs)
    flat = trained(weight.flatten(1), [g.flatten(1) for g in gradients], sketch, **knobs)
    assert conv.weights["w"].shape == weight.shape
    assert_equal(conv.weights["w"].flatten(1), flat.weights["w"])
    assert_equal(conv.state("w"), flat.state("w"))


def test_state_has_the_documented_shapes() -> None:
    weights = {
        "matrix": start_of(5, 19),
        "experts": start_of(3, 5, 19),
        "bias": start_of(7),
        "gain": start_of(),
    }
    reference = Reference(weights, sketch=hadamard_bases(8, 2), settings=ReferenceSettings())
    dense = Reference(weights, sketch=no_sketch, settings=ReferenceSettings())
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
    weight = start_of(3, 8)
    reference = trained(weight, gradients_of((3, 8), 1), hadamard_bases(8, 2))
    assert torch.equal(weight, start_of(3, 8))
    momentum_of(reference).zero_()
    assert momentum_of(reference).abs().sum() > 0


# ---------------------------------------------------------------- the step around the rule


def test_a_skipped_parameter_does_not_advance() -> None:
    gradients = {"a": gradients_of((3, 8), 3), "b": gradients_of((4, 8), 3)}
    both = Reference(
        {"a": start_of(3, 8), "b": start_of(4, 8)},
        sketch=hadamard_bases(8, 2),
        settings=ReferenceSettings(kappa=2, lr=0.1, weight_decay=0.1),
    )
    both.step({"a": gradients["a"][0], "b": gradients["b"][0]})
    both.step({"a": None, "b": gradients["b"][1]})
    both.step({"b": gradients["b"][2]})
    both.step({"a": gradients["a"][1]})
    for name, steps in (("a", 2), ("b", 3)):
        alone = Reference(
            {name: both.weights[name] * 0 + start_of(*both.weights[name].shape)},
            sketch=hadamard_bases(8, 2),
            settings=ReferenceSettings(kappa=2, lr=0.1, weight_decay=0.1),
        )
        for gradient in gradients[name][:steps]:
            alone.step({name: gradient})
        assert torch.equal(both.weights[name], alone.weights[name])
        assert both.state(name)["step"] == steps
        assert_equal(both.state(name), alone.state(name))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compressed", [True, False])
def test_clip_bounds_what_each_rule_says(rule: str, compressed: bool) -> None:
    # flora and strict bound U, none and blend bound X: at step 1 dense blend has U = 0.1 X.
    sketch = hadamard_bases(8, 8) if compressed else no_sketch
    knobs = {"momentum": rule, "lr": 1.0, "blend_gain": 1.0}
    start, gradients = torch.zeros(6, 16, dtype=F64), gradients_of((6, 16), 1)
    free = -trained(start, gradients, sketch, clip=None, **knobs).weights["w"]
    held = -trained(start, gradients, sketch, clip=0.01, **knobs).weights["w"]
    size = {"blend": 0.1 * 0.01}.get(rule, 0.01)
    assert float(free.square().mean().sqrt()) > 0.05
    assert_close(held, free / free.square().mean().sqrt() * size)
    loose = -trained(start, gradients, sketch, clip=100.0, **knobs).weights["w"]
    assert torch.equal(loose, free)


@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (9,)])
def test_weight_decay_is_decoupled(shape: tuple[int, ...]) -> None:
    gradients = gradients_of(shape, 1)
    plain = trained(start_of(*shape), gradients, hadamard_bases(8, 2), lr=0.1)
    decayed = trained(start_of(*shape), gradients, hadamard_bases(8, 2), lr=0.1, weight_decay=0.5)
    assert_close(decayed.weights["w"], plain.weights["w"] - 0.1 * 0.5 * start_of(*shape))
    tensors = {"row", "column", "momentum", "second"} & plain.state("w").keys()
    for key in tensors:
        assert_equal(decayed.state("w")[key], plain.state("w")[key])


@pytest.mark.parametrize("shape", [(4, 8), (9,)])
def test_scale_parameter_multiplies_the_step_by_the_rms_of_the_weight(
    shape: tuple[int, ...],
) -> None:
    gradients = gradients_of(shape, 1)
    for start in (start_of(*shape), 1e-5 * start_of(*shape)):
        scale = max(1e-3, float(start.square().mean().sqrt()))
        knobs = {"lr": 0.1, "weight_decay": 0.5}
        scaled = trained(start, gradients, hadamard_bases(8, 2), scale_parameter=True, **knobs)
        plain = trained(start, gradients, hadamard_bases(8, 2), **knobs)
        kept = (1 - 0.1 * 0.5) * start
        torch.testing.assert_close(
            scaled.weights["w"] - kept, scale * (plain.weights["w"] - kept), rtol=1e-10, atol=1e-15
        )


def test_a_relative_lr_grows_with_a_matrix_and_not_with_a_vector() -> None:
    start, gradients = start_of(4, 8), gradients_of((4, 8), 2)
    knobs = {"lr": 0.1, "momentum": "none", "scale_parameter": "relative"}
    cases = ((start, 1.5, 1.5), (start, 3.0, 2.0), (start, 0.1, 0.5), (1e-4 * start, 9.0, 1.0))
    for first, growth, scale in cases:
        grown = trained(first, gradients[:1], hadamard_bases(8, 2), **knobs)
        plain = trained(first, gradients[:1], hadamard_bases(8, 2), lr=0.1, momentum="none")
        assert_equal(grown.weights["w"], plain.weights["w"])
        size = max(1e-3, float(first.square().mean().sqrt()))
        assert_close(grown.state("w")["start"], torch.tensor([size], dtype=start.dtype))
        later = start * growth * size / start.square().mean().sqrt()
        for each in (grown, plain):
            each.weights["w"].copy_(later)
            each.step({"w": gradients[1]})
        change, expected = (each.weights["w"] - later for each in (grown, plain))
        assert_close(change, scale * expected)
    assert "start" not in trained(start_of(9), [], hadamard_bases(8, 2), **knobs).state("w")


def test_maximize_negates_the_gradient() -> None:
    gradients = gradients_of((4, 8), 3)
    up = trained(start_of(4, 8), gradients, hadamard_bases(8, 2), maximize=True)
    down = trained(start_of(4, 8), [-g for g in gradients], hadamard_bases(8, 2))
    assert torch.equal(up.weights["w"], down.weights["w"])


def test_weights_may_be_trained_in_place_by_autograd() -> None:
    reference = trained(start_of(4, 8), [], hadamard_bases(8, 2))
    weight = reference.weights["w"].requires_grad_()
    weight.square().sum().backward()
    reference.step({"w": weight.grad})
    assert reference.weights["w"] is weight
    assert weight.is_leaf
    assert not torch.equal(weight, start_of(4, 8))


def test_settings_and_sketches_may_differ_by_name() -> None:
    weights = {"a": start_of(4, 8), "b": start_of(4, 8)}
    reference = Reference(
        weights,
        sketch=lambda name, matrix, window: (
            hadamard_bases(8, 2)(name, matrix, window) if name == "a" else None
        ),
        settings=lambda name: ReferenceSettings(lr=0.0 if name == "a" else 0.1),
    )
    reference.step(weights)
    assert torch.equal(reference.weights["a"], weights["a"])
    assert not torch.equal(reference.weights["b"], weights["b"])
    assert momentum_of(reference, "a").shape == (4, 1, 2)
    assert momentum_of(reference, "b").shape == (4, 8)
