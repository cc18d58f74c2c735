# SPDX-License-Identifier: Apache-2.0
"""Every function of torch on a sketched gradient's stand-in is right, or refused by name.

The judge of an addition is torch: what the same call adds to zeros. In float64 the two differ by
the order of a few hundred sums: 1e-12.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from flora_dist.gradients.placeholder import CompressedGradient, stands_in
from tests.battery import zoo
from tests.battery.oracle import STEPS, distances, reference_of, trainable
from tests.battery.test_layouts import EXACT
from tests.battery.wrapped import in_fsdp2
from tests.conftest import pool_of
from tests.gradients import layouts
from tests.gradients.oracle import MANY, GradientSketch, SketchedCase, Weights
from tests.gradients.small import SETTINGS, Small, attached, inputs, refused
from tests.harness.launched import ROOT

EQUAL = 1e-12


# ---- every function


@cache
def verdicts() -> dict[str, str]:
    """By name; a process that ends early leaves the name it ended at without one."""
    command = [sys.executable, "-m", "tests.gradients.every_function"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found, name = {}, ""
    for line in ended.stdout.splitlines():
        if not line.startswith('["'):
            continue  # some functions print
        kind, word = json.loads(line)
        name = word if kind == "called" else name
        found[name] = "no verdict" if kind == "called" else word
    assert ended.returncode == 0, f"{name} ended the process: {ended.stderr[-2000:]}"
    return found


SERVED = {
    *(f"torch.Tensor.{name}" for name in ("add_", "__iadd__", "sub_", "__isub__", "subtract_")),
    *(f"torch.Tensor.{name}" for name in ("zero_", "detach", "detach_", "requires_grad_")),
    *(f"torch.Tensor.{name}" for name in ("data", "data.__get__")),
    "another view of its memory",
}
OF_THE_CLASS = {
    f"torch.Tensor.{name}" for name in ("__annotations__", "__delitem__", "_python_dispatch")
}
"""Attributes that say nothing of a gradient."""


def test_every_function_of_torch_is_right_or_refused_by_name() -> None:
    # model.share_memory() was a segmentation fault; `p.grad.numpy()` and others read nothing.
    found = verdicts()
    assert sum(verdict == "refused" for verdict in found.values()) > 1000
    assert {name for name, verdict in found.items() if verdict == "the stand-in"} == SERVED
    rest = {n: v for n, v in found.items() if v not in {"refused", "as dense", "the stand-in"}}
    assert rest.keys() == OF_THE_CLASS, rest


# ---- adding


def started(level: str = "compressed") -> tuple[nn.Module, Any, Tensor]:
    """A model in float64 after a backward, the sketches' C, and a gradient's stand-in."""
    model = Small().double()
    _, handle = attached(model, level)
    model(inputs(0).double()).backward()
    return model, handle.gradients.flows["first.weight"], model.first.weight.grad


X = torch.randn(24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
WHOLE = (100 * X).long()


def _iadd(gradient: Tensor, other: Any) -> None:
    gradient += other


def _isub(gradient: Tensor, other: Any) -> None:
    gradient -= other


ADDITIONS: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda g: g.add_(X),
    "alpha": lambda g: g.add_(X, alpha=0.3),
    "a whole alpha": lambda g: g.add_(X, alpha=-2),
    "the older order": lambda g: g.add_(other=X, alpha=0.25),
    "a number": lambda g: g.add_(1.5),
    "a number and alpha": lambda g: g.add_(1.5, alpha=0.5),
    "a tensor of one number": lambda g: g.add_(torch.tensor(2.0)),
    "a row": lambda g: g.add_(X[0], alpha=0.3),
    "a column": lambda g: g.add_(X[:, :1]),
    "+=": lambda g: _iadd(g, X),
    "+= number": lambda g: _iadd(g, 1),
    "-=": lambda g: _isub(g, X),
    "-= row": lambda g: _isub(g, X[0]),
    "sub_": lambda g: g.sub_(X, alpha=0.3),
    "subtract_": lambda g: g.subtract_(0.5),
    "float32": lambda g: g.add_(X.float(), alpha=0.3),
    "whole numbers": lambda g: g.add_(WHOLE, alpha=0.3),
    "booleans": lambda g: g.add_(X > 0),
    "other strides": lambda g: g.add_(X.t().contiguous().t(), alpha=0.3),
    "sparse": lambda g: g.add_(X.relu().to_sparse(), alpha=0.3),
    "data": lambda g: g.data.add_(X, alpha=0.3),
    "detached": lambda g: g.detach().add_(X),
    "a parameter, with gradients on": lambda g: _with_parameter(g),
    "an operator of aten": lambda g: torch.ops.aten.add_.Tensor(g, X, alpha=0.3),
}


def _with_parameter(gradient: Tensor) -> None:
    with torch.enable_grad():
        gradient.detach().add_(nn.Parameter(X), alpha=0.3)


@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_adds_what_torch_would(name: str) -> None:
    # alpha was dropped: coupled weight decay by hand was 0.19 to 0.45 off.
    _, flow, gradient = started()
    zeros = torch.zeros(24, 20, dtype=torch.float64)
    _, other, _ = started()
    with torch.no_grad():
        ADDITIONS[name](gradient)
        ADDITIONS[name](zeros)
        other.accumulator.add_(zeros)
    wanted = other.accumulator.sums_ENKR
    assert (flow.accumulator.sums_ENKR - wanted).abs().max() < EQUAL * wanted.abs().max()


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a shape": lambda g: g.add_(torch.ones(7)),
    "a larger shape": lambda g: g.add_(torch.ones(2, 24, 20)),
    "a complex number": lambda g: g.add_(1j),
    "complex numbers": lambda g: g.add_(X.to(torch.complex64)),
    "booleans": lambda g: g.sub_(X > 0),
    "a complex alpha": lambda g: g.add_(X, alpha=1j),
    "text": lambda g: g.add_("1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_to_add_is_refused_as_torch_does(name: str) -> None:
    _, flow, gradient = started()
    before = flow.accumulator.sums_ENKR.clone()
    with torch.no_grad():
        with pytest.raises((RuntimeError, TypeError)) as dense:
            WRONG[name](torch.zeros(24, 20, dtype=torch.float64))
        with pytest.raises(dense.type):
            WRONG[name](gradient)
    assert torch.equal(flow.accumulator.sums_ENKR, before)


def test_a_stand_in_that_was_dropped_is_not_added_to() -> None:
    model, flow, gradient = started()
    model.zero_grad()
    with pytest.raises(
        RuntimeError, match=r"only until it is stepped or zeroed; that of 'first\.weight' has been"
    ):
        gradient.add_(1.0)
    assert model.first.weight.grad is None
    model(inputs(0).double()).backward()
    wanted = started()[1].accumulator.sums_ENKR
    assert torch.equal(flow.accumulator.sums_ENKR, wanted)


def test_a_stand_in_answers_what_needs_no_elements() -> None:
    _, _, gradient = started()
    assert isinstance(gradient.data, CompressedGradient)
    assert (gradient.shape, gradient.dtype) == ((24, 20), torch.float64)
    assert f"{gradient}" == "CompressedGradient('first.weight', shape=(24, 20))"


def test_a_model_is_compiled_while_stand_ins_are_there() -> None:
    # torch.compile describes the .grad of parameters too.
    found = []
    for backend in ("eager", "aot_eager"):
        model, flow, _ = started()
        torch.compile(model, backend=backend)(inputs(1).double()).backward()
        found.append(flow.accumulator.sums_ENKR)
    model, flow, _ = started()
    model(inputs(1).double()).backward()
    for sums in found:
        torch.testing.assert_close(sums, flow.accumulator.sums_ENKR, rtol=EQUAL, atol=EQUAL)


def test_a_model_is_shared_after_zero_grad() -> None:
    model, _, _ = started()
    with pytest.raises(RuntimeError, match=r"share_memory_.*to move, copy or share.*zero_grad"):
        model.share_memory()
    model.zero_grad()
    assert model.share_memory().first.weight.is_shared()


# ---- adding on every layout

DECAY = 0.3


def decayed(layout: str, case: SketchedCase) -> tuple[Weights, list[float]]:
    """A run whose gradients have coupled weight decay, by hand, after the last micro-batch."""
    accumulate = layouts.accumulate

    def accumulate_and_decay(wrapped: nn.Module, *given: Any) -> None:
        accumulate(wrapped, *given)
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=DECAY / 2)
                parameter.grad += DECAY / 2 * parameter.detach()

    layouts.accumulate = accumulate_and_decay
    try:
        return layouts.run(layout, case)
    finally:
        layouts.accumulate = accumulate


@cache
def decayed_reference() -> tuple[Weights, Weights]:
    case = decay_case("compressed")
    model = zoo.build(case.dtype)
    start = trainable(model)
    reference, sketch = reference_of(case, start), GradientSketch(case)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(1, STEPS + 1):
        model.zero_grad()
        model(zoo.batch(step - 1, case.samples)).backward()
        seen = {
            n: sketch.seen(n, p.grad + DECAY * p.detach(), step)
            for n, p in parameters.items()
            if p.grad is not None
        }
        reference.step(seen)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return start, dict(reference.weights)


def decay_case(level: str) -> SketchedCase:
    return SketchedCase(settings={"momentum": "flora"}, level=level, micro_batches=3, samples=MANY)


@pytest.mark.parametrize(
    ("layout", "level"),
    [
        *[(layout, "compressed") for layout in layouts.LAYOUTS if layout != "compiled ddp x2"],
        *[(layout, "fused") for layout in ("plain", "fsdp2 x2")],
        *[(layout, "sharded") for layout in ("fsdp2 x3", "columns x2")],
    ],
)
def test_what_is_added_on_a_layout_is_added_to_the_mean(layout: str, level: str) -> None:
    # Under FSDP2 every `p.grad += ...` raised "shape '[1, 111, 8]' is invalid".
    start, expected = decayed_reference()
    for weights, _ in pool_of(layouts.LAYOUTS[layout][0])(decayed, layout, decay_case(level)):
        _, worst = distances(start, expected, weights)
        assert worst < EXACT


def reads_of_shards() -> dict[str, str]:
    """What functions say to a stand-in inside a DTensor, and around it."""
    model = in_fsdp2(zoo.build(torch.float32))
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    flora_dist.attach(model, optimizer, "compressed")
    model(zoo.share(zoo.batch(0, MANY), dist.get_rank(), 2)).backward()
    gradient: Any = model.up.weight.grad
    assert stands_in(gradient)
    assert stands_in(gradient.data)
    gradient.data.add_(model.up.weight.data, alpha=0.1)
    return {
        "out of place": refused(lambda: gradient + 1, RuntimeError),
        "scaled": refused(lambda: gradient.mul_(2), RuntimeError),
        "whole": refused(lambda: gradient.full_tensor(), RuntimeError),
        "all-reduced": refused(lambda: dist.all_reduce(gradient.to_local()), RuntimeError),
    }


@pytest.mark.ranks(2)
def test_a_stand_in_inside_a_dtensor_refuses_by_name() -> None:
    for found in pool_of(2)(reads_of_shards):
        assert all("the gradient of 'up.weight' is kept as sketches" in v for v in found.values())
