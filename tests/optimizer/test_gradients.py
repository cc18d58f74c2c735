# SPDX-License-Identifier: Apache-2.0
"""Gradients that are missing, upside down, not finite or oddly laid out; closures; pieces."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs

TOLERANCE = 1e-11  # the project's bound for float64


def test_a_missing_gradient_skips_the_parameter_and_its_clock() -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS, weight_decay=0.5)
    runs.train(optimizer, parameters, range(2))
    skipped = {name: parameters[name] for name in ("wide", "bias")}
    kept = runs.values(skipped)
    states = {name: copy.deepcopy(dict(optimizer.state[p])) for name, p in skipped.items()}
    runs.train(optimizer, parameters, range(2, 4), without=skipped)
    # weight decay included: nothing of it happens
    runs.assert_equal(runs.values(skipped), kept)
    for name, parameter in skipped.items():
        runs.assert_equal(dict(optimizer.state[parameter]), states[name])
    assert optimizer.state[parameters["whole"]]["step"] == 4
    assert optimizer.state[parameters["whole"]]["window"] == 1
    assert optimizer.state[parameters["wide"]]["window"] == 0


def test_steps_with_gaps_are_the_reference_with_the_same_gaps() -> None:
    parameters = runs.build()
    start = runs.values(parameters)
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    reference = reference_of(Case(settings=runs.SETTINGS), start)
    names = list(parameters)
    for step in range(9):
        gaps = {name for place, name in enumerate(names) if (place + step) % 3 == 0}
        runs.set_gradients(parameters, step, without=gaps)
        reference.step({name: p.grad for name, p in parameters.items()})
        optimizer.step()
    assert distances(start, dict(reference.weights), runs.values(parameters))[1] < TOLERANCE


def test_a_later_step_without_any_gradient_changes_no_weight_and_no_clock() -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS, skip_nonfinite=True)
    runs.train(optimizer, parameters, range(1))
    start = runs.values(parameters)
    optimizer.zero_grad()
    assert optimizer.step() is None
    runs.assert_equal(runs.values(parameters), start)
    assert all(kept["step"] == 1 for kept in optimizer.state.values())


def test_a_closure_runs_once_with_gradients_on_and_its_loss_comes_back() -> None:
    model = nn.Linear(16, 16).double()
    optimizer = Flora(model.named_parameters(), **runs.SETTINGS)
    modes = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(3, 16, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first, second = optimizer.step(closure), optimizer.step(closure)
    assert modes == [True, True]
    assert isinstance(first, Tensor)
    assert float(second.detach()) < float(first.detach())
    assert optimizer.state[model.weight]["step"] == 2


def test_maximize_is_the_run_of_negated_gradients() -> None:
    uphill = runs.expected_run(range(5), maximize=True)
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    for step in range(5):
        runs.set_gradients(parameters, step)
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.neg_()
        optimizer.step()
    runs.assert_equal(uphill, runs.values(parameters))
    assert not torch.equal(uphill["wide"], runs.expected_run(range(5))["wide"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_leaves_the_gradients_alone(dtype: torch.dtype) -> None:
    parameters = runs.build(dtype=dtype)
    optimizer = Flora(parameters.items(), **runs.SETTINGS, maximize=True)
    runs.set_gradients(parameters, 0)
    kept = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    optimizer.step()
    runs.assert_equal({n: p.grad for n, p in parameters.items()}, kept)


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend", "none"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["wide", "experts", "narrow", "bias", "scale"])
def test_skip_nonfinite_skips_the_step_of_all_bit_for_bit(
    where: str, poison: float, momentum: str
) -> None:
    settings: dict[str, Any] = {**runs.SETTINGS, "momentum": momentum, "weight_decay": 0.1}
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **settings, skip_nonfinite=True)
    runs.train(optimizer, parameters, range(2))
    before = runs.everything(optimizer)
    runs.set_gradients(parameters, 2)
    gradient = parameters[where].grad
    assert gradient is not None
    gradient.view(-1)[-1] = poison
    assert optimizer.step(lambda: 7.0) == 7.0
    runs.assert_equal(before, runs.everything(optimizer))
    runs.train(optimizer, parameters, range(2, 4))
    expected = runs.expected_run(range(4), momentum=momentum, weight_decay=0.1)
    runs.assert_equal(runs.values(parameters), expected)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_skip_nonfinite_of_one_group_skips_all_groups(clip: float | None) -> None:
    parameters = runs.build()
    items = list(parameters.items())
    groups = [{"params": items[:3]}, {"params": items[3:], "skip_nonfinite": True}]
    optimizer = Flora(groups, **{**runs.SETTINGS, "clip": clip})
    runs.train(optimizer, parameters, range(2))
    before = runs.everything(optimizer)
    runs.set_gradients(parameters, 2)
    assert parameters["wide"].grad is not None
    parameters["wide"].grad[0, 0] = math.nan
    optimizer.step()
    runs.assert_equal(before, runs.everything(optimizer))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_without_skip_nonfinite_the_step_goes_through_as_in_torch(poison: float) -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.set_gradients(parameters, 0)
    for name in ("wide", "bias"):
        gradient = parameters[name].grad
        assert gradient is not None
        gradient.view(-1)[0] = poison
    optimizer.step()
    expected = runs.expected_run(range(1))
    for name, parameter in parameters.items():
        if name in {"wide", "bias"}:
            assert bool(parameter.isnan().any()), name
        else:
            assert torch.equal(parameter, expected[name]), name
    assert optimizer.state[parameters["wide"]]["step"] == 1


def test_a_grad_scaler_on_cpu_skips_the_step_it_overflowed_in() -> None:
    model = nn.Linear(16, 16)
    optimizer = Flora(model.named_parameters(), **runs.SETTINGS)
    plain = copy.deepcopy(model)
    unscaled = Flora(plain.named_parameters(), **runs.SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    x = torch.linspace(-1, 1, 48).view(3, 16)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        kept = runs.values(dict(model.named_parameters()))
        if step == 2:
            assert model.weight.grad is not None
            model.weight.grad[3, 3] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            runs.assert_equal(runs.values(dict(model.named_parameters())), kept)
            continue
        unscaled.zero_grad()
        plain(x).square().sum().backward()
        unscaled.step()
    assert scaler.get_scale() == 128.0
    assert optimizer.state[model.weight]["step"] == 3
    # A power of two scales exactly, so the runs are equal bit for bit.
    runs.assert_equal(
        runs.values(dict(model.named_parameters())), runs.values(dict(plain.named_parameters()))
    )


@pytest.mark.parametrize("scale", [1e-12, 1e4, 1e8])
def test_columns_and_rows_of_zeros_stay_finite_in_float32(scale: float) -> None:
    """Summed losses give gradients of 1e5 beside a dead input feature, whose column is zero."""
    for momentum in ("flora", "flora_strict", "blend", "none"):
        parameters = runs.build({"wide": (5, 20), "experts": (2, 4, 16)}, torch.float32)
        start = runs.values(parameters)
        optimizer = Flora(parameters.items(), **{**runs.SETTINGS, "momentum": momentum})
        for step in range(3):
            runs.set_gradients(parameters, step)
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.grad.mul_(scale)
                parameter.grad[..., 3] = 0
                parameter.grad[..., 2, :] = 0
            optimizer.step()
        for name, parameter in parameters.items():
            assert bool(parameter.isfinite().all()), (momentum, name)
            assert not torch.equal(parameter, start[name]), (momentum, name)
