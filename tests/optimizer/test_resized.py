# SPDX-License-Identifier: Apache-2.0
"""Weights that are replaced in place by others: of another shape, or of another dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from tests.battery.flat import layout_of
from tests.battery.oracle import Case, distances, reference_of
from tests.conftest import pool_of
from tests.optimizer import runs

SHAPES = {"matrix": (16, 24), "experts": (3, 4, 16), "bias": (16,)}
Change = Callable[[Tensor], Tensor]
CHANGES: dict[str, tuple[str, Change]] = {
    "fewer rows": ("matrix", lambda w: w[:15]),
    "fewer columns": ("matrix", lambda w: w[:, :8]),
    "more rows": ("matrix", lambda w: torch.cat([w, w])),
    "as many elements": ("matrix", lambda w: w.view(12, 32)),
    "more dims": ("matrix", lambda w: w.view(2, 8, 24)),
    "a vector": ("matrix", torch.flatten),
    "a scalar": ("bias", lambda w: w[0]),
    "fewer experts": ("experts", lambda w: w[:2]),
    "a shorter bias": ("bias", lambda w: w[:7]),
    "nothing": ("matrix", lambda w: w[:0]),
}


def _replace(parameters: runs.Parameters, change: str) -> str:
    name, make = CHANGES[change]
    parameters[name].grad = None
    parameters[name].data = make(parameters[name].data).clone()
    return name


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"nothing"}))
def test_a_weight_of_another_shape_after_a_step_is_refused_and_nothing_changes(change: str) -> None:
    """Pruned rows were stepped with the state of those that had stood in their place."""
    parameters = runs.build(SHAPES)
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2))
    kept = copy.deepcopy(optimizer.state_dict())
    name = _replace(parameters, change)
    before = runs.everything(optimizer)
    runs.set_gradients(parameters, 2)
    words = [repr(name), str(tuple(parameters[name].shape))]
    for _ in range(2):  # and not the first time only
        runs.assert_refused(words, optimizer.step)
        runs.assert_refused(words, optimizer.report)
    runs.assert_equal(runs.everything(optimizer), before)
    parameters[name].data = runs.build(SHAPES)[name].data
    runs.set_gradients(parameters, 2)
    optimizer.load_state_dict(kept)
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_of_another_shape_before_the_first_step_is_trained_as_it_is(change: str) -> None:
    """A report had fixed the old shape."""
    parameters = runs.build(SHAPES)
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    optimizer.report()
    _replace(parameters, change)
    start = {name: weight for name, weight in runs.values(parameters).items() if weight.numel()}
    reference = reference_of(Case(settings=runs.SETTINGS), start)
    for step in range(4):
        runs.set_gradients(parameters, step)
        reference.step({name: parameters[name].grad for name in start})
        optimizer.step()
    got = {name: weight for name, weight in runs.values(parameters).items() if name in start}
    assert distances(start, dict(reference.weights), got)[1] < 1e-11  # the bound for float64


def test_low_precision_in_mid_run_keeps_its_state_and_another_arithmetic_is_refused() -> None:
    model = nn.Linear(24, 16)
    optimizer = Flora(model.named_parameters(), **runs.SETTINGS)
    parameters = dict(model.named_parameters())
    runs.train(optimizer, parameters, range(1))
    model.bfloat16()
    runs.train(optimizer, parameters, range(1, 2))
    assert optimizer.state[model.weight]["step"] == 2
    model.double()
    model.zero_grad()
    runs.assert_refused(["torch.float64", "torch.float32"], optimizer.report)


def test_a_weight_of_another_shape_is_refused_where_gradients_are_sketched() -> None:
    model = nn.Linear(24, 16)
    optimizer = Flora(model.named_parameters(), **runs.SETTINGS)
    flora_dist.attach(model, optimizer, "compressed")
    model.weight.data = model.weight.data[:15].clone()
    model.bias.grad = torch.ones(16)
    runs.assert_refused(["'weight'", "(16, 24)", "(15, 24)"], optimizer.step)


def _shorten() -> str:
    shapes = {"matrix": (4, 8)}
    flat = nn.Parameter(torch.ones(16))
    optimizer = Flora([flat], **runs.SETTINGS)
    optimizer.attach_layout(layout_of(flat, shapes, [0, 16, 32]))
    flat.grad = torch.ones(16)
    optimizer.step()
    flat.grad = None
    flat.data = flat.data[:12].clone()
    flat.grad = torch.ones(12)
    with pytest.raises(
        ValueError, match="must keep the size it had when it was attached"
    ) as refused:
        optimizer.step()
    return str(refused.value)


def test_a_flat_tensor_of_another_size_is_refused() -> None:
    for message in pool_of(2)(_shorten):
        assert "'matrix'" in message
