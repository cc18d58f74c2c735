# SPDX-License-Identifier: Apache-2.0
"""Saved and loaded state: the run goes on bit for bit, or is refused and nothing has changed."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from flora_dist import Flora, checkpoint
from flora_dist.core.state import settings as config
from tests.optimizer import runs

State = dict[str, Any]
OTHERS = {"maximize": True, "strict": False}
"""What a fresh optimizer may be given in place of what it then loads."""

# weights, state: what a step is stored in
PRECISIONS = [
    (torch.float64, "float32"),
    (torch.float32, "float32"),
    (torch.bfloat16, "float32"),
    (torch.bfloat16, "bfloat16"),
    (torch.float16, "bfloat16"),
]


def _through_a_file(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


def _copy_weights(source: runs.Parameters, target: runs.Parameters) -> None:
    with torch.no_grad():
        for name, parameter in target.items():
            parameter.copy_(source[name])


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend", "none"])
@pytest.mark.parametrize(("dtype", "state_dtype"), PRECISIONS, ids=str)
def test_a_loaded_run_goes_on_bit_for_bit_from_the_middle_of_a_window(
    dtype: torch.dtype, state_dtype: str, momentum: str
) -> None:
    settings = {"state_dtype": state_dtype, "momentum": momentum, "beta2": 0.99}
    parameters, optimizer = runs.trained(4, dtype, **settings)  # windows last 3 steps
    saved = _through_a_file(optimizer.state_dict())
    resumed, fresh = runs.pair(dtype, **settings)
    _copy_weights(parameters, resumed)
    fresh.load_state_dict(saved)
    runs.assert_equal(fresh.state_dict(), optimizer.state_dict())
    runs.train(optimizer, parameters, range(4, 8))
    runs.train(fresh, resumed, range(4, 8))
    runs.assert_equal(runs.values(resumed), runs.values(parameters))
    runs.assert_equal(fresh.state_dict(), optimizer.state_dict())


def test_statistics_of_bfloat16_weights_stay_float32() -> None:
    """torch casts loaded state to the parameter's dtype: 8 bits of a second moment would stay."""
    _, optimizer = runs.trained(dtype=torch.bfloat16)
    _, fresh = runs.pair(torch.bfloat16)
    fresh.load_state_dict(optimizer.state_dict())
    for index, parameter in enumerate(fresh.param_groups[0]["params"]):
        kept = fresh.state[parameter]
        saved = optimizer.state_dict()["state"][index]
        for name, value in kept.items():
            if isinstance(value, Tensor):
                assert value.dtype == torch.float32, name
                assert not torch.equal(value.bfloat16().float(), value) or not value.any(), name
        runs.assert_equal(dict(kept), saved)


def test_settings_and_rates_are_loaded_as_saved() -> None:
    parameters, optimizer = runs.trained(2)
    optimizer.param_groups[0].update(lr=3e-3, weight_decay=0.2, initial_lr=5.0)
    resumed, fresh = runs.pair(lr=9.0)
    _copy_weights(parameters, resumed)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 3e-3
    assert fresh.param_groups[0]["initial_lr"] == 5.0
    runs.train(optimizer, parameters, range(2, 5))
    runs.train(fresh, resumed, range(2, 5))
    runs.assert_equal(runs.values(resumed), runs.values(parameters))


def test_state_of_before_the_first_step_and_of_frozen_parameters_loads() -> None:
    parameters, optimizer = runs.pair()
    _, fresh = runs.pair()
    fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state
    parameters["wide"].requires_grad_(False)
    runs.train(optimizer, parameters, range(2), without={"wide"})
    saved = optimizer.state_dict()
    resumed, fresh = runs.trained(1)
    fresh.load_state_dict(saved)
    assert "step" not in fresh.state.get(resumed["wide"], {})
    assert fresh.state[resumed["whole"]]["step"] == 2


def test_the_argument_keeps_its_name() -> None:
    _, optimizer = runs.trained()
    _, fresh = runs.pair()
    fresh.load_state_dict(state_dict=optimizer.state_dict())
    runs.assert_equal(fresh.state_dict(), optimizer.state_dict())


def test_loading_copies() -> None:
    parameters, optimizer = runs.trained()
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    twins = [runs.pair() for _ in range(2)]
    for resumed, fresh in twins:
        fresh.load_state_dict(saved)
        _copy_weights(parameters, resumed)
    runs.train(twins[0][1], twins[0][0], range(4, 6))
    runs.assert_equal(saved, kept)
    runs.assert_equal(twins[1][1].state_dict(), kept)
    runs.assert_equal(optimizer.state_dict(), kept)


def test_loading_into_a_used_optimizer_replaces_all_of_it() -> None:
    parameters, optimizer = runs.trained(4)
    saved, weights = copy.deepcopy(optimizer.state_dict()), runs.values(parameters)
    runs.train(optimizer, parameters, range(4, 7))
    expected = runs.values(parameters)
    runs.train(optimizer, parameters, range(20, 23))
    optimizer.load_state_dict(saved)
    _copy_weights(weights, parameters)
    runs.train(optimizer, parameters, range(4, 7))
    runs.assert_equal(runs.values(parameters), expected)


def test_state_is_tensors_and_whole_numbers() -> None:
    _, optimizer = runs.trained(momentum="flora_strict")
    for kept in optimizer.state.values():
        assert {type(value) for value in kept.values()} == {Tensor, int}
        assert {"format", "gradients", "seed", "sketch", "step", "window"} <= set(kept)


def test_hooks_see_and_may_replace_what_is_loaded() -> None:
    _, optimizer = runs.trained(2)
    other = copy.deepcopy(runs.trained(5)[1].state_dict())
    other["param_groups"][0]["lr"] = 0.125
    _, fresh = runs.pair()
    seen: list[Any] = []

    def replace(_: torch.optim.Optimizer, state: State) -> State:
        seen.append(state["state"][0]["step"])
        return other

    def look(loaded: torch.optim.Optimizer) -> None:
        seen.append(loaded.state[loaded.param_groups[0]["params"][0]]["step"])

    # Registered after and before ours, which are made at each load.
    fresh.register_load_state_dict_pre_hook(replace)
    fresh.register_load_state_dict_post_hook(look)
    fresh.register_load_state_dict_post_hook(look, prepend=True)
    fresh.load_state_dict(optimizer.state_dict())
    assert seen == [2, 5, 5]
    runs.assert_equal(fresh.state_dict(), other)
    fresh.load_state_dict(optimizer.state_dict())
    assert seen == [2, 5, 5] * 2


@pytest.mark.parametrize("settings", [{"rank": 1}, {"block": 16}, {"momentum": "none"}])
def test_other_settings_that_shape_the_state_are_loaded_with_it(settings: dict[str, Any]) -> None:
    """Rank, block and rule stand in the saved groups: the loaded run is the saved one."""
    parameters, optimizer = runs.trained(2, **settings)
    resumed, fresh = runs.trained(1)
    fresh.load_state_dict(optimizer.state_dict())
    _copy_weights(parameters, resumed)
    runs.train(optimizer, parameters, range(2, 5))
    runs.train(fresh, resumed, range(2, 5))
    runs.assert_equal(runs.values(resumed), runs.values(parameters))


def test_positions_travel_with_the_state() -> None:
    parameters = runs.build({"first": (4, 16), "second": (4, 16)})
    optimizer = Flora(parameters.values(), **runs.SETTINGS)
    del optimizer.param_groups[0]["params"][0]
    # alone it would be #0; it was #0 when it first stepped, whatever the list was before
    runs.train(optimizer, {"second": parameters["second"]}, range(1))
    assert optimizer.state[parameters["second"]]["position"] == 0
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["position"] = 5
    resumed = runs.build({"second": (4, 16)})
    fresh = Flora(resumed.values(), **runs.SETTINGS)
    fresh.load_state_dict(saved)
    assert fresh.report().rows[0].name == "#5"
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.report().rows[0].name == "#0"


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 16, dtype=torch.bfloat16)
        self.second = nn.Linear(16, 5, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).float().square().mean()


def _fit(model: _Model, optimizer: Flora, steps: int) -> None:
    x = torch.linspace(-1, 1, 60).view(3, 20).bfloat16()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_in_one_process_does_not_change_the_run(*, flat: bool) -> None:
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, plain = _Model(), _Model()
    optimizer = Flora(model.named_parameters(), **runs.SETTINGS, beta2=0.9)
    untouched = Flora(plain.named_parameters(), **runs.SETTINGS, beta2=0.9)
    _fit(model, optimizer, 4)
    _fit(plain, untouched, 8)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    _fit(model, optimizer, 4)
    runs.assert_equal(dict(model.state_dict()), dict(plain.state_dict()))
    resumed = _Model()
    fresh = Flora(resumed.named_parameters(), **runs.SETTINGS, beta2=0.9)
    resumed.load_state_dict(weights)
    dcp.set_optimizer_state_dict(resumed, fresh, _through_a_file(saved), options=options)
    _fit(resumed, fresh, 4)
    runs.assert_equal(dict(resumed.state_dict()), dict(plain.state_dict()))
    runs.assert_equal(fresh.state_dict()["state"], untouched.state_dict()["state"])


@pytest.mark.parametrize("missing", ["clip", "strict", "blend_gain", "weight_decay", "maximize"])
def test_a_setting_that_is_younger_than_a_state_has_its_default(missing: str) -> None:
    """The first setting added would have made every older state "saved by another optimizer"."""
    settings = {key: value for key, value in runs.SETTINGS.items() if key != missing}
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **settings)
    runs.train(optimizer, parameters, range(4))
    saved = _through_a_file(optimizer.state_dict())
    del saved["param_groups"][0][missing]
    kept = copy.deepcopy(saved)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    fresh = Flora(resumed.items(), **{**settings, missing: OTHERS.get(missing, 0.5)})
    fresh.load_state_dict(saved)
    runs.assert_equal(saved, kept)
    for each, its in ((optimizer, parameters), (fresh, resumed)):
        runs.train(each, its, range(4, 7))
    runs.assert_equal(runs.values(resumed), runs.values(parameters))


def test_what_a_setting_was_before_it_existed_stands_in_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "BEFORE", {"clip": None})
    saved = copy.deepcopy(runs.trained(2)[1].state_dict())
    del saved["param_groups"][0]["clip"]
    _, fresh = runs.pair()
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["clip"] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("weight_decay", "0"), ("maximize", 0), ("beta1", 1.5)],
)
def test_a_state_whose_settings_no_run_can_have_is_refused_and_changes_nothing(
    name: str, value: object
) -> None:
    """lr=nan of a damaged file was loaded, and the next step wrote NaN into every weight."""
    saved = copy.deepcopy(runs.trained(2)[1].state_dict())
    saved["param_groups"][0][name] = value
    _, fresh = runs.pair()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=f"settings must be those of a run; {name}"):
        fresh.load_state_dict(saved)
    assert fresh.state_dict() == before  # no tensors yet


BEFORE = {"rank": 8, "blend_gain": None}
"""What a run without settings had, before gain 1 at rank 16 became the default."""


@pytest.mark.parametrize("stored", ["state_dict", "checkpoint"])
def test_a_run_with_the_former_defaults_goes_on_with_them(stored: str, tmp_path: Path) -> None:
    shapes = {"weight": (20, 128), "bias": (20,)}
    old, new = (_Bare(runs.build(shapes, torch.float32)) for _ in range(2))
    optimizer = Flora(old.named_parameters(), **BEFORE)
    runs.train(optimizer, dict(old.named_parameters()), range(4))
    fresh = Flora(new.named_parameters())
    if stored == "checkpoint":
        checkpoint.save(tmp_path, old, optimizer, step=4)
        checkpoint.load(tmp_path, new, fresh)
    else:
        new.load_state_dict(old.state_dict())
        fresh.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert {key: fresh.param_groups[0][key] for key in BEFORE} == BEFORE
    for each, module in ((optimizer, old), (fresh, new)):
        runs.train(each, dict(module.named_parameters()), range(4, 7))
    runs.assert_equal(dict(new.state_dict()), dict(old.state_dict()))
    unlike = _Bare(runs.build(shapes, torch.float32))
    other = Flora(unlike.named_parameters())
    runs.train(other, dict(unlike.named_parameters()), range(7))
    assert not torch.equal(unlike.weight, old.weight)


class _Bare(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, parameters: runs.Parameters) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
