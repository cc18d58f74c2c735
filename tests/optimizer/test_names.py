# SPDX-License-Identifier: Apache-2.0
"""Names that stand beside parameters, and optimizers that have none."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward

from flora_dist import Flora, by_position
from tests.conftest import pool_of
from tests.optimizer import runs


def _beside(parameters: runs.Parameters, **changes: Any) -> dict[str, Any]:
    """A group as torch keeps it, and as torchtitan gives it."""
    return {"params": list(parameters.values()), "param_names": list(parameters), **changes}


def test_a_tied_tensor_is_dropped_with_its_name() -> None:
    """The tensor went and its name stayed, so later parameters had the names of others."""
    expected = runs.expected_run(range(4))
    parameters = runs.build()
    tensors, names = list(parameters.values()), list(parameters)
    group = {"params": [*tensors[:2], tensors[0], *tensors[2:]]}
    group["param_names"] = [*names[:2], "zzz.tied", *names[2:]]
    optimizer = Flora([group], **runs.SETTINGS)
    runs.train(optimizer, parameters, range(4))
    runs.assert_equal(runs.values(parameters), expected)
    assert optimizer.param_groups[0]["param_names"] == names
    assert len(group["params"]) == len(names) + 1  # the caller's own stays


def test_names_beside_parameters_are_the_run_of_pairs() -> None:
    expected = runs.expected_run(range(4))
    for way in ("constructor", "later"):
        parameters = runs.build()
        if way == "constructor":
            optimizer = Flora([_beside(parameters)], **runs.SETTINGS)
        else:
            first, *rest = parameters.items()
            optimizer = Flora([first], **runs.SETTINGS)
            optimizer.add_param_group(_beside(dict(rest)))
        runs.train(optimizer, parameters, range(4))
        runs.assert_equal(runs.values(parameters), expected)


@pytest.mark.parametrize(
    ("changes", "words", "kind"),
    [
        ({"param_names": ["one"]}, ["1 for 7", "(name, parameter)"], ValueError),
        ({"param_names": []}, ["0 for 7"], ValueError),
        ({"param_names": [*"abcdefgh"]}, ["8 for 7"], ValueError),
        ({"param_names": range(7)}, ["(int, Parameter)"], TypeError),
        ({"params": list(runs.build().items())}, ["named once"], ValueError),
        ({"params": [(1, nn.Parameter(torch.ones(8)))], "param_names": None}, ["int"], TypeError),
    ],
)
def test_names_that_do_not_fit_are_refused(
    changes: dict[str, Any], words: list[str], kind: type[Exception]
) -> None:
    parameters = runs.build()
    runs.assert_refused(words, lambda: Flora([_beside(parameters, **changes)]), kind)
    optimizer = Flora([("first", nn.Parameter(torch.ones(8, 8)))])
    before = runs.everything(optimizer)
    runs.assert_refused(
        words, lambda: optimizer.add_param_group(_beside(parameters, **changes)), kind
    )
    runs.assert_equal(runs.everything(optimizer), before)


# ---- names of a model


class _Tied(nn.Module):
    """Its first name is not the smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.zzz = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.zzz.weight
        self.up = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.head(self.zzz(x))).square().mean()


def test_names_taken_from_the_model_are_the_run_of_names_given() -> None:
    torch.manual_seed(0)
    model = _Tied()
    twin = copy.deepcopy(model)
    named = Flora(model.named_parameters(remove_duplicate=False), **runs.SETTINGS)
    taken = Flora(twin.parameters(), **runs.SETTINGS)
    taken.take_names(nn.ModuleDict({"module": twin}))  # as a wrapper has them
    assert [row.name for row in taken.report().rows] == [row.name for row in named.report().rows]
    for optimizer, each in ((named, model), (taken, twin)):
        for _ in range(4):
            each(torch.ones(2, 16)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for found, expected in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_parameters_by_position_are_the_run_without_names_and_no_warning() -> None:
    parameters, others = runs.build(), runs.build()
    first, *rest = others.values()
    groups = [{"params": [first]}, {"params": rest, "lr": runs.SETTINGS["lr"]}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs.train(by_position(groups, **runs.SETTINGS), others, range(4))
    with pytest.warns(UserWarning, match="have no names"):
        runs.train(Flora(parameters.values(), **runs.SETTINGS), parameters, range(4))
    runs.assert_equal(runs.values(others), runs.values(parameters))


def test_names_that_were_given_stay() -> None:
    layer = nn.Linear(16, 16)
    optimizer = Flora([("own", layer.weight), ("other", layer.bias)], **runs.SETTINGS)
    optimizer.take_names(layer)
    assert [row.name for row in optimizer.report().rows] == ["own", "other"]


def test_names_are_not_taken_late_or_from_another_model() -> None:
    layer = nn.Linear(16, 16)
    optimizer = Flora(layer.parameters(), **runs.SETTINGS)
    words = ["must belong to the model", "(16, 16)", "after sharding"]
    runs.assert_refused(words, lambda: optimizer.take_names(nn.Linear(16, 16)))
    assert "param_names" not in optimizer.param_groups[0]
    with pytest.warns(UserWarning, match=r"2 parameters have no names.*take_names"):
        _step(optimizer, layer.weight)
    words = ["before the first step", "model.named_parameters()"]
    runs.assert_refused(words, lambda: optimizer.take_names(layer))


def test_one_process_is_warned_once_of_parameters_without_names() -> None:
    layer = nn.Linear(16, 16)
    optimizer = Flora(layer.parameters(), **runs.SETTINGS)
    with pytest.warns(UserWarning, match="have no names") as caught:
        _step(optimizer, layer.weight)
    assert [Path(each.filename).name for each in caught] == ["test_names.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(optimizer, layer.weight)


def _nameless() -> str:
    layer = nn.Linear(16, 16)
    optimizer = Flora(layer.parameters(), **runs.SETTINGS)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="with several processes") as raised:
        _step(optimizer, layer.weight)
    assert torch.equal(layer.weight, before)
    assert not optimizer.state
    optimizer.take_names(layer)
    _step(optimizer, layer.weight)
    _step(by_position(layer.parameters(), **runs.SETTINGS), layer.weight)
    return str(raised.value)


@pytest.mark.ranks(2)
def test_several_processes_refuse_parameters_without_names() -> None:
    """They trained another run on DDP than on ZeRO, which has the model's names."""
    for said in pool_of(2)(_nameless):
        assert "call optimizer.take_names(model)" in said


# ---- optimizers that take turns


def _step(optimizer: Flora, parameter: Tensor) -> None:
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _pair_of(count: int = 2, **settings: Any) -> list[tuple[Flora, nn.Parameter]]:
    weights = [nn.Parameter(torch.ones(16, 16)) for _ in range(count)]
    return [(Flora([w], **{**runs.SETTINGS, **settings}), w) for w in weights]


def test_one_optimizer_for_each_parameter_without_names_is_refused() -> None:
    """All of them were "#0", with one random matrix for all."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    _apply_optimizer_in_backward(Flora, model.parameters(), runs.SETTINGS)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'#0'.*_apply_optimizer_in_backward"):
        model(torch.ones(2, 16)).sum().backward()
    assert torch.equal(model[0].weight, before)


def test_optimizers_without_names_that_take_turns_are_refused() -> None:
    (first, one), (second, other) = _pair_of()
    _step(first, one)
    _step(second, other)
    before = runs.everything(first)
    one.grad = torch.ones_like(one)
    runs.assert_refused(["take turns", "'#0'", "names", "seed"], first.step)
    runs.assert_equal(runs.everything(first), before)


def test_optimizers_may_take_turns_that_share_no_random_number() -> None:
    pairs = _pair_of(momentum="none") + _pair_of(rank=None)
    for seed in (3, 4):
        pairs += _pair_of(1, seed=seed)
    named = nn.Parameter(torch.ones(16, 16))
    pairs.append((Flora([("w", named)], **runs.SETTINGS), named))
    for _ in range(3):
        for optimizer, weight in pairs:
            _step(optimizer, weight)


def test_a_new_optimizer_may_follow_an_old_one_and_a_copy_take_turns_with_it() -> None:
    for optimizer, weight in _pair_of(3):
        for _ in range(2):
            _step(optimizer, weight)
    twins, twin = copy.deepcopy((weight, optimizer))
    for _ in range(2):
        _step(twin, twins)
        _step(optimizer, weight)
    assert torch.equal(twins, weight)
