# SPDX-License-Identifier: Apache-2.0
"""Optimizers that are copied, pickled, or whose tensors and groups an engine exchanges."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from flora_dist import Flora
from tests.optimizer import runs


def test_a_deep_copy_goes_on_as_the_original_and_apart_from_it() -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2))
    kept = runs.values(parameters)
    twins, twin = copy.deepcopy((parameters, optimizer))
    runs.train(twin, twins, range(2, 5))
    runs.assert_equal(runs.values(parameters), kept)
    runs.train(optimizer, parameters, range(2, 5))
    runs.assert_equal(runs.values(twins), runs.values(parameters))
    runs.assert_equal(twin.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_pickle_goes_on_as_the_original(steps_before: int) -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(steps_before))
    # our own bytes, read back in the same process
    twins, twin = pickle.loads(pickle.dumps((parameters, optimizer)))
    for each, its in ((optimizer, parameters), (twin, twins)):
        runs.train(each, its, range(steps_before, 5))
    runs.assert_equal(runs.values(twins), runs.values(parameters))
    late = {"late": nn.Parameter(torch.ones(8, dtype=torch.float64))}
    twin.add_param_group({"params": late.items()})
    runs.train(twin, late, range(1))
    assert twin.state[late["late"]]["step"] == 1


def test_tensors_swapped_in_before_the_first_step_are_trained() -> None:
    """accelerate's FSDP2 puts the sharded parameters into the groups after construction."""
    expected = runs.expected_run(range(4))
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    optimizer.report()
    swapped = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items() if p.ndim != 1}
    swapped["bias"] = parameters["bias"]
    swapped = {name: swapped[name] for name in parameters}
    optimizer.param_groups[0]["params"] = list(swapped.values())
    runs.train(optimizer, swapped, range(4))
    runs.assert_equal(runs.values(swapped), expected)
    assert set(optimizer.state) == set(swapped.values())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_flat_partition_swapped_in_unattached_is_an_error(steps_before: int) -> None:
    """Compressing it as a vector would silently keep dense state: how others fail on ZeRO."""
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(steps_before))
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters.values()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.param_groups[0]["param_names"] = ["flat"]
    before = runs.everything(optimizer)
    with pytest.raises(ValueError, match=rf"1-D tensor.*{flat.numel()} elements.*attach\(\)"):
        optimizer.step()
    runs.assert_equal(before, runs.everything(optimizer))


def test_groups_replaced_by_equal_copies_go_on() -> None:
    """Engines rebuild ``param_groups``; the parameters in them stay."""
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2))
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = runs.SETTINGS["lr"]
    runs.train(optimizer, parameters, range(2, 5))
    runs.assert_equal(runs.values(parameters), runs.expected_run(range(5)))
