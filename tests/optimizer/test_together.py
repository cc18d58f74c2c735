# SPDX-License-Identifier: Apache-2.0
"""Parameters of one shape are stepped together; no bit of theirs may show it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora

SHAPES = {
    "matrix": (96, 128),
    "narrow": (640, 24),
    "experts": (3, 40, 64),
    "convolution": (16, 8, 3, 3),
    "large": (300, 512),
    "vector": (4096,),
    "scalar": (),
}
COUNT = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "blend": {},
    "flora": {"momentum": "flora", "weight_decay": 0.1},
    "flora_strict": {"momentum": "flora_strict", "sketch": "gaussian"},
    "none": {"momentum": "none", "scale_parameter": True},
    "dense": {"rank": None, "momentum": "flora", "clip": 0.1},
    "bf16 momentum": {"state_dtype": "bfloat16", "maximize": True},
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        f"{name}.{index}": nn.Parameter(torch.randn(shape).to(dtype))
        for name, shape in SHAPES.items()
        for index in range(COUNT)
    }


def _gradients(weights: dict[str, nn.Parameter], step: int) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return {name: torch.randn_like(weight) for name, weight in weights.items()}


def _run(optimizers: list[Flora], weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    for step in range(4):
        for name, gradient in _gradients(weights, step).items():
            weights[name].grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_parameter_steps_to_the_same_bits_alone_and_beside_others_of_its_shape(
    name: str, dtype: torch.dtype
) -> None:
    settings = {"lr": 1e-2, "kappa": 2, **SETTINGS[name]}
    alone, together = _weights(dtype), _weights(dtype)
    one_each = [Flora([pair], **settings) for pair in alone.items()]
    expected = _run(one_each, alone)
    found = _run([Flora(together.items(), **settings)], together)
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not different


def test_a_matrix_among_forty_costs_few_of_our_calls() -> None:
    # The step asked the same static facts of every matrix in every step: 273 calls each.
    import sys

    import flora_dist

    root = str(flora_dist.__path__[0])

    def calls(count: int) -> int:
        parameters = [(f"p{i}", nn.Parameter(torch.ones(64, 64))) for i in range(count)]
        optimizer = Flora(parameters, lr=1e-3)
        total = 0

        def profile(frame: Any, event: str, _: Any) -> None:
            nonlocal total
            total += event == "call" and frame.f_code.co_filename.startswith(root)

        for step in range(3):
            for _, parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            sys.setprofile(profile if step == 2 else None)
            optimizer.step()
            sys.setprofile(None)
        return total

    assert (calls(40) - calls(8)) / 32 <= 30
