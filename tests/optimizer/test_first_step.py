# SPDX-License-Identifier: Apache-2.0
"""A first step that finds no gradient at all is refused, by every rank; what is meant is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flora_dist import Flora
from tests.conftest import pool_of
from tests.optimizer import runs

WORDS = ["first step", "none has one, on any rank", "named_parameters()"]


def test_a_first_step_without_any_gradient_is_refused_and_leaves_nothing() -> None:
    """An optimizer over the base of an adapted model, or over stale tensors, trained nothing."""
    parameters, optimizer = runs.pair()
    before = runs.everything(optimizer)
    runs.assert_refused([*WORDS, "7 parameters"], optimizer.step)
    runs.assert_equal(runs.everything(optimizer), before)
    runs.train(optimizer, parameters, range(2))
    for parameter in parameters.values():
        parameter.grad = None
    optimizer.step()  # later it may be so


def test_parameters_that_were_frozen_since_are_counted_in_the_message() -> None:
    parameters, optimizer = runs.pair()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    runs.assert_refused([*WORDS, "7 are frozen"], optimizer.step)


def test_one_gradient_in_one_group_is_enough() -> None:
    parameters = runs.build()
    groups = [{"params": [item]} for item in parameters.items()]
    optimizer = Flora(groups, **runs.SETTINGS)
    runs.train(optimizer, parameters, range(1), without=set(parameters) - {"bias"})
    assert [name for name, p in parameters.items() if optimizer.state[p]["step"]] == ["bias"]


def test_a_closure_may_bring_the_gradients() -> None:
    parameters, optimizer = runs.pair()
    optimizer.step(lambda: runs.set_gradients(parameters, 0))
    assert optimizer.state[parameters["wide"]]["step"] == 1


def test_a_step_skipped_for_nan_is_a_first_step() -> None:
    parameters, optimizer = runs.pair(skip_nonfinite=True)
    parameters["bias"].grad = torch.full_like(parameters["bias"], torch.nan)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[parameters["bias"]]["step"] == 0


def test_torch_may_ask_for_state_whether_anything_trains_or_not() -> None:
    for trains in (True, False):
        model = nn.Linear(16, 16).requires_grad_(trains)
        optimizer = Flora(model.named_parameters())
        get_optimizer_state_dict(model, optimizer)
        runs.assert_refused(WORDS, optimizer.step)


def test_a_loaded_optimizer_and_a_copy_without_its_model_are_looked_at_again() -> None:
    parameters, optimizer = runs.trained(2)
    fresh = Flora(runs.build().items(), **runs.SETTINGS)
    fresh.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    twin.zero_grad()  # gradients arrive at the model's own parameters
    for each in (fresh, twin):
        before = runs.everything(each)
        runs.assert_refused(WORDS, each.step)
        runs.assert_equal(runs.everything(each), before)
    runs.train(optimizer, parameters, range(2, 3))


def _stale() -> tuple[str, int]:
    """The optimizer is built before the model is sharded."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    optimizer = Flora(model.named_parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model(torch.ones(2, 16)).sum().backward()
    with pytest.raises(ValueError, match="before the model was sharded") as refused:
        optimizer.step()
    return str(refused.value), len(optimizer.state)


def test_an_optimizer_built_before_fsdp2_is_refused_on_every_rank() -> None:
    for message, states in pool_of(2)(_stale):
        assert "4 parameters" in message
        assert states == 0


def _on_some_ranks(ranks: tuple[int, ...], settings: dict[str, Any]) -> tuple[str, list[int]]:
    """A first step for which these ranks have gradients; rank 1 holds nothing of the bias."""
    model = nn.Linear(16, 1)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Flora(model.named_parameters(), **settings)
    message = ""
    for value in (torch.nan, 1.0) if settings else (1.0,):
        for parameter in model.parameters():
            parameter.grad = None
            if dist.get_rank() in ranks:
                parameter.grad = torch.full_like(parameter, value)
        try:
            optimizer.step()
        except ValueError as error:
            message = str(error)
    return message, [state["step"] for state in optimizer.state.values()]


@pytest.mark.parametrize("settings", [{}, {"skip_nonfinite": True}], ids=["", "skips"])
@pytest.mark.parametrize("ranks", [(), (0,), (1,)])
def test_ranks_agree_whichever_of_them_have_gradients(
    ranks: tuple[int, ...], settings: dict[str, Any]
) -> None:
    for message, steps in pool_of(2)(_on_some_ranks, ranks, settings, timeout=60.0):
        assert ("none has one" in message) is (not ranks)
        # What rank 1 holds is empty: nothing there is NaN, and nothing is skipped.
        steps_made = 2 if settings and 0 not in ranks else 1
        assert steps == ([steps_made] * 2 if ranks else [])


def test_a_compiled_step_is_the_plain_one_and_is_not_traced() -> None:
    """Traced, four steps took minutes: what they decide on is Python's."""
    plain, compiled = runs.build(), runs.build()
    runs.train(Flora(plain.items(), **runs.SETTINGS), plain, range(3))
    optimizer = Flora(compiled.items(), **runs.SETTINGS)
    counter = CompileCounter()
    optimizer.step = torch.compile(optimizer.step, backend=counter)  # type: ignore[method-assign]
    runs.train(optimizer, compiled, range(3))
    runs.assert_equal(runs.values(compiled), runs.values(plain))
    assert counter.frame_count == 0
