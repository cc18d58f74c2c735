# SPDX-License-Identifier: Apache-2.0
"""State that does not fit is refused, with both values, and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from flora_dist import Flora
from tests.optimizer import runs

State = dict[str, Any]


def _of(**settings: Any) -> Callable[[], State]:
    return lambda: runs.trained(2, **settings)[1].state_dict()


def _of_shapes(**shapes: tuple[int, ...]) -> Callable[[], State]:
    def make() -> State:
        parameters = runs.build({**runs.SHAPES, **shapes})
        optimizer = Flora(parameters.items(), **runs.SETTINGS)
        runs.train(optimizer, parameters, range(2))
        return optimizer.state_dict()

    return make


def _of_names(rename: Callable[[list[str]], list[str]], steps: int = 2) -> Callable[[], State]:
    def make() -> State:
        parameters = runs.build()
        names = rename(list(parameters))
        given = list(zip(names, (parameters[n] for n in parameters), strict=True))
        optimizer = Flora(given, **runs.SETTINGS)
        runs.train(optimizer, parameters, range(steps))
        return optimizer.state_dict()

    return make


def _of_order() -> State:
    parameters = runs.build()
    optimizer = Flora(list(parameters.items())[::-1], **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2))
    return optimizer.state_dict()


def _of_fewer() -> State:
    parameters = runs.build()
    del parameters["wide"]
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2))
    return optimizer.state_dict()


def _of_two_groups() -> State:
    items = list(runs.build().items())
    return Flora([{"params": items[:2]}, {"params": items[2:]}], **runs.SETTINGS).state_dict()


def _of_adamw() -> State:
    parameters = runs.build()
    optimizer = torch.optim.AdamW(parameters.items())
    runs.train(optimizer, parameters, range(2))
    return optimizer.state_dict()


def _edited(**numbers: Any) -> Callable[[], State]:
    def make() -> State:
        state = copy.deepcopy(_of()())
        state["state"][2].update(numbers)
        return state

    return make


def _without(name: str) -> Callable[[], State]:
    def make() -> State:
        state = copy.deepcopy(_of()())
        del state["state"][2][name]
        return state

    return make


REFUSED: dict[str, tuple[Callable[[], State], list[str]]] = {
    "another seed": (_of(seed=1), ["seed", "seed=1", "seed=0", "Pass seed=1"]),
    "another sketch": (
        _edited(sketch=1),
        ["'experts'", "sketch='hadamard'", "'gaussian'", "settings of the run"],
    ),
    "another level": (
        _edited(gradients=2),
        ["'experts'", "gradients='dense'", "'compressed'", "settings of the run"],
    ),
    "an unknown level": (_edited(gradients=9), ["'experts'", "gradients='dense'", "9"]),
    "an unknown sketch": (_edited(sketch=7), ["'experts'", "sketch='hadamard'", "7"]),
    "a later format": (_edited(format=2), ["'experts'", "format=1", "2", "settings of the run"]),
    "no format": (_without("format"), ["'experts'", "format=1", "None"]),
    "no momentum": (_without("momentum"), ["'experts'", "must hold", "'momentum'"]),
    "another shape": (_of_shapes(wide=(6, 20)), ["'wide'", "(5, 3, 2)", "(6, 3, 2)", "model"]),
    "more columns": (_of_shapes(wide=(5, 21)), ["'wide'", "column", "(20,)", "(21,)", "model"]),
    "another vector": (_of_shapes(bias=(8,)), ["'bias'", "(7,)", "(8,)", "model"]),
    "other names": (
        _of_names(lambda names: ["other", *names[1:]]),
        ["order", "'other'", "'wide'", "same model"],
    ),
    "another order": (_of_order, ["order", "'scale'", "'wide'", "same model"]),
    "fewer parameters": (_of_fewer, ["groups of [7]", "[6]", "groups of the run"]),
    "other groups": (_of_two_groups, ["groups of [7]", "[2, 5]", "groups of the run"]),
    "another precision": (
        lambda: runs.trained(2, torch.float32)[1].state_dict(),
        ["'wide'", "torch.float64", "torch.float32", "model's dtype that the state was made with"],
    ),
    "AdamW's": (_of_adamw, ["Flora's settings", "'rank'", "another optimizer"]),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("case", REFUSED)
def test_state_that_does_not_fit_is_refused_and_nothing_has_changed(
    case: str, *, used: bool
) -> None:
    make, words = REFUSED[case]
    parameters, optimizer = runs.trained(3 if used else 0)
    state = make()
    before = runs.everything(optimizer)
    runs.assert_refused(words, lambda: optimizer.load_state_dict(state))
    runs.assert_equal(before, runs.everything(optimizer))
    runs.train(optimizer, parameters, range(3 if used else 0, 5))
    runs.assert_equal(runs.values(parameters), runs.expected_run(range(5)))


def test_settings_in_the_saved_groups_that_the_state_does_not_fit_are_refused() -> None:
    for edit in ({"rank": 1}, {"block": 16}, {"sketch": "gaussian"}, {"momentum": "none"}):
        state = copy.deepcopy(_of()())
        state["param_groups"][0].update(edit)
        _, optimizer = runs.trained(1)
        before = runs.everything(optimizer)
        with pytest.raises(ValueError, match=r"the state|the local shape"):
            optimizer.load_state_dict(state)
        runs.assert_equal(before, runs.everything(optimizer))


def test_a_replacement_by_a_hook_is_checked_too() -> None:
    _, optimizer = runs.trained(2)
    wrong = runs.trained(2, seed=1)[1].state_dict()
    _, fresh = runs.trained(1)
    fresh.register_load_state_dict_pre_hook(lambda _, __: wrong)
    before = runs.everything(fresh)
    with pytest.raises(ValueError, match="seed"):
        fresh.load_state_dict(optimizer.state_dict())
    runs.assert_equal(before, runs.everything(fresh))


@pytest.mark.parametrize("momentum", ["flora", "none"])
def test_state_of_float64_is_refused_by_a_model_of_float32(momentum: str) -> None:
    """It was taken, and the run went on with statistics of a precision that no run has."""
    state = runs.trained(2, momentum=momentum)[1].state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        _, optimizer = runs.pair(dtype, momentum=momentum)
        before = runs.everything(optimizer)
        words = ["'wide'", "must be torch.float32", f"weight of {dtype}", "has torch.float64"]
        runs.assert_refused(words, partial(optimizer.load_state_dict, state))
        runs.assert_equal(runs.everything(optimizer), before)
