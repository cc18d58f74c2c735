# SPDX-License-Identifier: Apache-2.0
"""``Flora.paper``, and the warning about its transfer at short windows."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from flora_dist import Flora
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs


def test_unscaled_transfers_at_a_short_window_warn_once_and_a_long_one_does_not() -> None:
    # gaussian, rank 2 of 8: noise 9/2 per transfer, log(5.5) / (2 log(1/0.9)) = 8.09 steps
    settings = {**runs.SETTINGS, "transfer": "paper", "sketch": "gaussian"}
    with pytest.warns(UserWarning, match=r"kappa=9; got kappa=8.*transfer='shrink'") as caught:
        Flora(runs.build().items(), **{**settings, "kappa": 8})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Flora(runs.build().items(), **{**settings, "kappa": 9})


def test_the_paper_preset_sets_what_the_paper_says_and_no_more() -> None:
    group = Flora.paper([nn.Parameter(torch.ones(4, 4))], 0.5, weight_decay=0.1).param_groups[0]
    said = {
        "lr": 0.5,
        "rank": 256,
        "block": "full",
        "sketch": "gaussian",
        "momentum": "flora",
        "transfer": "paper",
        "kappa": 1000,
        "scale_parameter": True,
        "state_dtype": "float32",
        "weight_decay": 0.1,
    }
    plain = Flora([nn.Parameter(torch.ones(4, 4))]).param_groups[0]
    changed = {k: v for k, v in group.items() if k != "params" and v != plain[k]}
    assert changed == {k: v for k, v in said.items() if v != plain[k]}
    assert {key: group[key] for key in said} == said
    assert Flora.paper([nn.Parameter(torch.ones(4, 4))], kappa=7).param_groups[0]["kappa"] == 7


@pytest.mark.filterwarnings("ignore:transfer='paper'")
def test_the_paper_preset_is_the_reference_over_whole_rows() -> None:
    shapes = {"tall": (12, 7), "wide": (6, 30), "experts": (2, 9, 8), "bias": (5,)}
    parameters = runs.build(shapes)
    start = runs.values(parameters)
    paper = {
        "lr": 0.01,
        "rank": 2,
        "block": "full",
        "sketch": "gaussian",
        "momentum": "flora",
        "transfer": "paper",
        "kappa": 3,
        "scale_parameter": True,
        "clip": 1.0,
    }
    reference = reference_of(Case(settings=paper), start)
    optimizer = Flora.paper(parameters.items(), 0.01, rank=2, kappa=3)
    for step in range(8):
        runs.set_gradients(parameters, step)
        reference.step({name: parameter.grad for name, parameter in parameters.items()})
        optimizer.step()
    assert optimizer.state[parameters["wide"]]["momentum"].shape == (6, 5, 2)
    assert optimizer.state[parameters["tall"]]["momentum"].shape == (12, 1, 2)
    # the project's bound for float64
    assert max(distances(start, dict(reference.weights), runs.values(parameters))) < 1e-11
