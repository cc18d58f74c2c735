# SPDX-License-Identifier: Apache-2.0
"""Shapes, strides and sizes: empty, of any dimensions, not contiguous, larger than a piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs

TOLERANCE = 1e-11  # the project's bound for float64


@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0,), (0, 4, 16), (2, 0, 16), (2, 4, 0)], ids=str
)
@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend", "none"])
def test_a_parameter_without_elements_is_carried_along(
    shape: tuple[int, ...], momentum: str
) -> None:
    expected = runs.expected_run(range(4), momentum=momentum)
    parameters = runs.build()
    empty = {"empty": nn.Parameter(torch.zeros(shape, dtype=torch.float64))}
    settings = {**runs.SETTINGS, "momentum": momentum, "scale_parameter": False}
    optimizer = Flora([*parameters.items(), *empty.items()], **settings)
    runs.train(optimizer, {**parameters, **empty}, range(4))
    runs.assert_equal(runs.values(parameters), expected)
    assert optimizer.report().state_bytes == runs.state_bytes(optimizer)
    for value in optimizer.state[empty["empty"]].values():
        assert not isinstance(value, Tensor) or bool(value.isfinite().all())


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend", "none"])
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (13,), (6, 1), (1, 13), (1, 1), (2, 3, 8), (6, 8, 3), (4, 2, 3, 3), (3, 2, 2, 3, 2)],
)
def test_every_number_of_dimensions_is_the_reference(shape: tuple[int, ...], momentum: str) -> None:
    parameters = runs.build({"w": shape})
    start = runs.values(parameters)
    settings = {**runs.SETTINGS, "momentum": momentum}
    optimizer = Flora(parameters.items(), **settings)
    reference = reference_of(Case(settings=settings), start)
    for step in range(7):
        runs.set_gradients(parameters, step)
        reference.step({"w": parameters["w"].grad})
        optimizer.step()
    assert distances(start, dict(reference.weights), runs.values(parameters))[1] < TOLERANCE


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _strided(x: Tensor) -> Tensor:
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 20), _transposed),
        ((3, 4, 13), _transposed),
        ((6, 4, 3, 3), _channels_last),
        ((6, 4, 3, 3), _transposed),
        ((5, 20), _strided),
        ((3, 4, 13), _strided),
        ((9,), _strided),
    ],
)
@pytest.mark.parametrize("of", ["weight", "gradient", "both"])
def test_memory_that_is_not_contiguous_is_the_contiguous_run(
    shape: tuple[int, ...],
    layout: Any,
    of: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The kernels leave such weights to torch's operators, whose sums have another order: compared
    # are the strides, not the paths (tests/kernels compares those).
    monkeypatch.setenv("FLORA_DIST_KERNELS", "torch")
    plain = runs.build({"w": shape}, dtype)
    odd = {"w": nn.Parameter(plain["w"].detach().clone())}
    if of != "gradient":
        odd["w"] = nn.Parameter(layout(plain["w"].detach()))
        assert not odd["w"].is_contiguous()
    strides = odd["w"].stride()
    pair = [Flora(each.items(), **runs.SETTINGS, weight_decay=0.1) for each in (plain, odd)]
    for step in range(5):
        for each, optimizer in zip((plain, odd), pair, strict=True):
            runs.set_gradients(each, step)
            gradient = each["w"].grad
            assert gradient is not None
            if each is odd and of != "weight":
                each["w"].grad = layout(gradient)
            optimizer.step()
    assert odd["w"].stride() == strides
    if dtype == torch.bfloat16:
        _assert_equal_up_to_rare_roundings(odd["w"].detach(), plain["w"].detach())
    else:
        # Products read the same numbers in the same order; only their kernels may differ.
        rtol = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(odd["w"], plain["w"], rtol=rtol, atol=0)


def _assert_equal_up_to_rare_roundings(one: Tensor, other: Tensor) -> None:
    """fp32 noise moves a stochastic rounding with a chance of about 2^-14 per element and step."""
    assert int((one != other).sum()) <= 1


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend", "none"])
@pytest.mark.parametrize("limit", [1, 20, 64])
def test_a_parameter_larger_than_a_piece_is_the_run_of_one_piece(
    limit: int, momentum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"momentum": momentum, "scale_parameter": True, "weight_decay": 0.1}
    whole = runs.expected_run(range(7), **settings)
    monkeypatch.setattr("flora_dist.core.step.views.CPU_ELEMENTS", limit)
    start = runs.values(runs.build())
    pieces = runs.run(range(7), **settings)
    # float64 sums in another order: rounding of 1e-16, far below the project's bound
    assert distances(start, whole, pieces)[1] < TOLERANCE


def test_pieces_round_low_precision_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORA_DIST_KERNELS", "torch")  # pieces are those of torch's operators
    finals = []
    for limit in (1 << 17, 16):
        monkeypatch.setattr("flora_dist.core.step.views.CPU_ELEMENTS", limit)
        parameters = runs.build(dtype=torch.bfloat16)
        optimizer = Flora(parameters.items(), **(runs.SETTINGS | {"state_dtype": "bfloat16"}))
        runs.train(optimizer, parameters, range(1))
        finals.append(runs.values(parameters))
    for name, weight in finals[0].items():
        _assert_equal_up_to_rare_roundings(weight, finals[1][name])
