# SPDX-License-Identifier: Apache-2.0
"""How parameters are given: names, positions, groups, schedules, late and frozen ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flora_dist import Flora
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs

NAMES = tuple(runs.SHAPES)
# The project's bound for float64: distance over movement, per parameter.
TOLERANCE = 1e-11


def _worst(case: Case, parameters: runs.Parameters, start: dict[str, Tensor], steps: int) -> float:
    reference = reference_of(case, start)
    for step in range(steps):
        reference.step({n: runs.draw(n, step, w.shape, w.dtype) for n, w in start.items()})
    return distances(start, dict(reference.weights), runs.values(parameters))[1]


def test_a_list_a_generator_and_a_group_of_tensors_are_the_same_run() -> None:
    def run(give: Callable[[runs.Parameters], Any]) -> dict[str, Tensor]:
        parameters = runs.build()
        runs.train(Flora(give(parameters), **runs.SETTINGS), parameters, range(4))
        return runs.values(parameters)

    listed = run(lambda parameters: list(parameters.values()))
    runs.assert_equal(listed, run(lambda parameters: (p for p in parameters.values())))
    runs.assert_equal(listed, run(lambda parameters: [{"params": parameters.values()}]))


def test_a_group_may_hold_one_bare_tensor_as_in_torch() -> None:
    parameters = runs.build({"wide": (5, 20)})
    groups = [{"params": parameters["wide"]}]
    optimizer = Flora(groups, **runs.SETTINGS)
    runs.train(optimizer, parameters, range(1))
    assert optimizer.state[parameters["wide"]]["step"] == 1
    assert groups == [{"params": parameters["wide"]}]


def test_names_make_the_run_independent_of_order_and_grouping() -> None:
    expected = runs.expected_run(range(5))

    def run(give: Callable[[runs.Parameters], Any]) -> dict[str, Tensor]:
        parameters = runs.build()
        runs.train(Flora(give(parameters), **runs.SETTINGS), parameters, range(5))
        return runs.values(parameters)

    def one_each(parameters: runs.Parameters) -> list[dict[str, Any]]:
        return [{"params": [item]} for item in reversed(parameters.items())]

    runs.assert_equal(expected, run(lambda parameters: list(reversed(parameters.items()))))
    runs.assert_equal(expected, run(one_each))


def test_prefixes_of_wrappers_do_not_change_the_run() -> None:
    expected = runs.expected_run(range(4))
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."):
        parameters = runs.build()
        named = [(prefix + name, p) for name, p in parameters.items()]
        optimizer = Flora(named, **runs.SETTINGS)
        assert tuple(row.name for row in optimizer.report().rows) == NAMES
        runs.train(optimizer, parameters, range(4))
        runs.assert_equal(expected, runs.values(parameters))


def test_without_names_projections_hang_on_positions() -> None:
    positions = {name: f"#{index}" for index, name in enumerate(NAMES)}
    parameters = runs.build()
    start = runs.values(parameters)
    optimizer = Flora(parameters.values(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(5))
    by_position = {positions[name]: weight for name, weight in start.items()}
    reference = reference_of(Case(settings=runs.SETTINGS), by_position)
    for step in range(5):
        drawn = {n: runs.draw(n, step, w.shape, w.dtype) for n, w in start.items()}
        reference.step({positions[name]: gradient for name, gradient in drawn.items()})
    expected = {name: reference.weights[positions[name]] for name in NAMES}
    assert distances(start, expected, runs.values(parameters))[1] < TOLERANCE
    # and order matters there: another position is another projection
    other = runs.build()
    runs.train(Flora(list(other.values())[::-1], **runs.SETTINGS), other, range(5))
    assert not torch.equal(other["wide"], parameters["wide"])


def test_positions_stand_in_the_state_and_the_report_says_so() -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.values(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(1))
    kept = [optimizer.state[p]["position"] for p in parameters.values()]
    assert kept == list(range(len(NAMES)))
    assert [row.name for row in optimizer.report().rows] == [f"#{i}" for i in kept]
    assert optimizer.report().unnamed == len(NAMES)
    assert "7 parameters have no names" in optimizer.report().summary()
    named = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(named, parameters, range(1))
    assert all("position" not in named.state[p] for p in parameters.values())
    assert named.report().unnamed == 0
    assert "no names" not in named.report().summary()


def test_a_position_stays_when_another_parameter_leaves_the_group() -> None:
    parameters = runs.build({"first": (4, 16), "second": (4, 16)})
    optimizer = Flora(parameters.values(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2))
    alone = copy.deepcopy((parameters, optimizer))
    runs.train(optimizer, parameters, range(2, 6))
    parameters_alone, optimizer_alone = alone
    del optimizer_alone.param_groups[0]["params"][0]
    runs.train(optimizer_alone, {"second": parameters_alone["second"]}, range(2, 6))
    assert torch.equal(parameters_alone["second"], parameters["second"])


def test_a_tied_parameter_given_under_two_names_is_one_under_the_smallest() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zebra = nn.Linear(16, 16, bias=False)
            self.apple = nn.Linear(16, 16, bias=False)
            self.apple.weight = self.zebra.weight

    model = Tied()
    optimizer = Flora(model.named_parameters(remove_duplicate=False), **runs.SETTINGS)
    assert [row.name for row in optimizer.report().rows] == ["apple.weight"]
    assert optimizer.report().adamw_bytes == 8 * 256


def test_groups_override_every_setting_and_equal_the_reference_of_each() -> None:
    overrides: dict[str, dict[str, Any]] = {
        "wide": {"rank": None},
        "whole": {"lr": 3e-2, "momentum": "none"},
        "experts": {"momentum": "blend", "kappa": 2, "beta1": 0.5},
        "conv": {"sketch": "gaussian", "block": 4, "rank": 1, "weight_decay": 0.1},
        "narrow": {"clip": None, "beta2": 0.99, "momentum": "flora_strict"},
        "bias": {"maximize": True, "eps": 1e-3},
        "scale": {"scale_parameter": True, "seed": 3},
    }
    parameters = runs.build()
    start = runs.values(parameters)
    groups = [{"params": [(n, p)], **overrides[n]} for n, p in parameters.items()]
    optimizer = Flora(groups, **runs.SETTINGS)
    runs.train(optimizer, parameters, range(6))
    for name in NAMES:
        case = Case(settings={**runs.SETTINGS, **overrides[name]})
        one = {name: parameters[name]}
        assert _worst(case, one, {name: start[name]}, 6) < TOLERANCE, name
    assert optimizer.report().rows[0].how == "dense: rank=None"
    assert "momentum" not in optimizer.state[parameters["whole"]]


def test_a_parameter_added_mid_run_counts_its_own_steps_from_one() -> None:
    parameters = runs.build()
    late = {"wide": parameters.pop("wide")}
    start = runs.values(late)
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(4))
    optimizer.add_param_group({"params": late.items(), "lr": 5e-2, "kappa": 2})
    for step in range(5):
        runs.set_gradients(parameters, 4 + step)
        runs.set_gradients(late, step)
        optimizer.step()
    assert optimizer.state[late["wide"]]["step"] == 5
    assert optimizer.state[late["wide"]]["window"] == 2
    assert optimizer.state[parameters["whole"]]["step"] == 9
    case = Case(settings={**runs.SETTINGS, "lr": 5e-2, "kappa": 2})
    assert _worst(case, late, start, 5) < TOLERANCE
    expected = runs.expected_run(range(9))
    for name, weight in parameters.items():
        assert torch.equal(weight, expected[name]), name


def test_an_added_position_comes_after_the_ones_there() -> None:
    parameters = runs.build({"first": (4, 16), "second": (4, 16)})
    optimizer = Flora([parameters["first"]], **runs.SETTINGS)
    optimizer.add_param_group({"params": [parameters["second"]]})
    whole = runs.build({"first": (4, 16), "second": (4, 16)})
    runs.train(optimizer, parameters, range(4))
    runs.train(Flora(whole.values(), **runs.SETTINGS), whole, range(4))
    runs.assert_equal(runs.values(parameters), runs.values(whole))


def test_a_parameter_may_be_frozen_and_thawed_mid_run() -> None:
    parameters = runs.build()
    start = runs.values(parameters)
    optimizer = Flora(parameters.items(), **runs.SETTINGS, weight_decay=0.1)
    runs.train(optimizer, parameters, range(4))
    frozen = parameters["experts"]
    kept = frozen.detach().clone()
    state = copy.deepcopy(dict(optimizer.state[frozen]))
    frozen.requires_grad_(False)
    runs.train(optimizer, parameters, range(4, 6), without={"experts"})
    assert torch.equal(frozen, kept)
    runs.assert_equal(dict(optimizer.state[frozen]), state)
    assert "experts" not in str(optimizer.report())
    frozen.requires_grad_(True)
    runs.train(optimizer, parameters, range(6, 9))
    reference = reference_of(Case(settings={**runs.SETTINGS, "weight_decay": 0.1}), start)
    for step in range(9):
        drawn = {n: runs.draw(n, step, w.shape, w.dtype) for n, w in start.items()}
        if step in {4, 5}:
            del drawn["experts"]
        reference.step(drawn)
    assert distances(start, dict(reference.weights), runs.values(parameters))[1] < TOLERANCE


def test_a_parameter_frozen_after_backward_is_not_stepped() -> None:
    """FSDP2 left it alone, one process and DDP stepped it by the gradient that was still there."""
    parameters = runs.build()
    start = runs.values(parameters)
    optimizer = Flora(parameters.items(), **runs.SETTINGS, weight_decay=0.1)
    runs.train(optimizer, parameters, range(1))
    expected = {name: weight.clone() for name, weight in runs.values(parameters).items()}
    for name in ("experts", "bias"):
        runs.set_gradients({name: parameters[name]}, 1)
        parameters[name].requires_grad_(False)
    optimizer.step()
    for name in ("experts", "bias"):
        assert torch.equal(parameters[name], expected[name])
        assert not torch.equal(parameters[name], start[name])
        assert optimizer.state[parameters[name]]["step"] == 1


def test_a_parameter_frozen_from_the_start_gets_state_when_it_trains() -> None:
    parameters = runs.build()
    parameters["wide"].requires_grad_(False)
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2), without={"wide"})
    assert "step" not in optimizer.state.get(parameters["wide"], {})
    parameters["wide"].requires_grad_(True)
    runs.train(optimizer, parameters, range(2, 4))
    assert optimizer.state[parameters["wide"]]["step"] == 2


def test_two_optimizers_of_one_model_do_not_see_each_other() -> None:
    expected = runs.expected_run(range(5))
    parameters = runs.build()
    items = list(parameters.items())
    halves = [Flora(items[:3], **runs.SETTINGS), Flora(items[3:], **runs.SETTINGS)]
    for step in range(5):
        runs.set_gradients(parameters, step)
        for optimizer in halves:
            optimizer.step()
    runs.assert_equal(runs.values(parameters), expected)


def test_two_seeds_on_one_model_are_the_runs_of_each_seed() -> None:
    runs_of = {seed: runs.expected_run(range(5), seed=seed) for seed in (0, 1)}
    parameters = runs.build()
    items = list(parameters.items())
    halves = [Flora(items[s::2], **runs.SETTINGS, seed=s) for s in (0, 1)]
    for step in range(5):
        runs.set_gradients(parameters, step)
        for optimizer in halves:
            optimizer.step()
    for index, name in enumerate(NAMES):
        assert torch.equal(parameters[name], runs_of[index % 2][name]), name
        sketched = name not in {"narrow", "bias", "scale"}
        assert torch.equal(runs_of[0][name], runs_of[1][name]) is not sketched, name
