# SPDX-License-Identifier: Apache-2.0
"""Fused layers under autocast and ``torch.compile``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests.gradients.small import Small, attached, formed, inputs
from tests.gradients.test_fused_layers import BFLOAT16, EQUAL, Layers, data, sums_of

# ---- precision


class Watched(nn.Module):
    """A layer whose input and output's gradient are written down, as they are multiplied."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach().bfloat16()
        y = self.layer(x)
        y.register_hook(self._look)
        return y

    def _look(self, dy: Tensor) -> None:
        assert dy.dtype == torch.bfloat16
        self.dy = dy


@pytest.mark.parametrize("sketch", ["hadamard", "gaussian", "rademacher"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_autocast_rounds_inputs_and_sketches_alone(kind: type[nn.Module], sketch: str) -> None:
    torch.manual_seed(0)
    model = Watched(kind(96, 100))
    settings = {"rank": 3, "block": 32, "sketch": sketch}  # 1 / sqrt(3) is not in bfloat16
    _, handle = attached(model, "fused", settings)
    x = torch.randn(512, 96 if kind is nn.Linear else 100, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert model.layer.bias.grad.dtype == torch.float32
    left, right = (model.dy, model.x) if kind is nn.Linear else (model.x, model.dy)
    gradient = left.double().t() @ right.double()
    accumulator = handle.gradients.flows["layer.weight"].accumulator
    (sketch_RB,) = accumulator.sketch(torch.device("cpu")).double()
    padded = functional.pad(gradient, (0, -gradient.shape[1] % 32)).unflatten(1, (-1, 32))
    wanted = padded @ sketch_RB.t()
    (sums,) = sums_of(handle)["layer.weight"]
    assert sums.dtype == torch.float32
    assert (sums - wanted).norm() < BFLOAT16 * wanted.norm()


def test_autocast_does_not_lose_the_gradient_of_who_else_casts_the_weight() -> None:
    # Autocast keeps one cast per weight; made inside of a custom function, it had no gradient.
    model = Small()
    _, handle = attached(model, "fused")
    x = inputs(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.first(x)
        functional.linear(x, model.first.weight).float().square().mean().backward()
    assert sums_of(handle)["first.weight"].any()


def test_gradients_outside_of_autocast_are_those_of_the_module() -> None:
    model, dense = Layers(), Layers()
    _optimizer, _ = attached(model, "fused")
    inputs = [data(0).float().requires_grad_() for _ in range(2)]
    for module, x in zip((model, dense), inputs, strict=True):
        module(x).backward()
    assert inputs[0].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # the same products
    for name in ("down.bias", "again.bias", "conv1d.bias"):
        assert torch.equal(model.get_parameter(name).grad, dense.get_parameter(name).grad)


# ---- torch.compile


def test_compiled_steps_equal_eager_ones_and_compile_once() -> None:
    runs = []
    for backend in (None, CompileCounterWithBackend("aot_eager")):
        model = Layers().double()
        optimizer, handle = attached(model, "fused")
        called = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        sums = []
        for step in range(4):
            called(data(step)).backward()
            sums.append(sums_of(handle))
            optimizer.step()
            optimizer.zero_grad()
        runs.append(sums)
    assert backend is not None
    assert backend.frame_count == 1
    for eager, compiled in zip(*runs, strict=True):
        for name, value in eager.items():
            assert (value - compiled[name]).norm() <= EQUAL * value.norm(), name


def test_autocast_is_compiled_too() -> None:
    model = Small()
    optimizer, handle = attached(model, "fused")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(inputs(step))
        loss.backward()
        assert sums_of(handle).keys() == {"first.weight", "extra.weight", "last.weight"}
        optimizer.step()
        optimizer.zero_grad()
    assert backend.frame_count == 1


def test_a_model_that_was_compiled_before_notices() -> None:
    model = Small()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(inputs(0)).backward()
    model.zero_grad()
    _, handle = attached(model, "fused")
    with formed() as names:
        compiled(inputs(0)).backward()
    assert not names
    assert sums_of(handle)["first.weight"].any()
    handle.remove()
    compiled(inputs(0)).backward()
    assert type(model.first.weight.grad) is Tensor
