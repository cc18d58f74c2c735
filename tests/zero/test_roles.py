# SPDX-License-Identifier: Apache-2.0
"""Roles in a DeepSpeed JSON are those of an optimizer that is given, on real engines."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from flora_dist import Flora
from tests.conftest import launched_pool_of
from tests.zero.small import PARAMS, build, config_of, start, states, train, weights

pytestmark = pytest.mark.deepspeed
ROLES: dict[str, dict[str, Any]] = {
    "down.*": {"rank": 8, "state_bits": 8},
    "*.bias": {"momentum": "none"},
}
"""Of the model of two layers whose momenta are else of PARAMS."""


def by_roles(stage: int, from_json: bool) -> tuple[dict[str, torch.Tensor], dict[str, str], int]:
    """Weights, how each is kept, and the momenta of this rank, with roles in the JSON or given."""
    block = {"type": "Flora", "params": {**PARAMS, "roles": ROLES}}
    if from_json:
        engine, flora = start(json.loads(json.dumps(config_of(stage, optimizer=block))))
    else:
        model = build()
        own = Flora(model.named_parameters(), **PARAMS, roles=ROLES)
        engine, flora = start(config_of(stage), model=model, optimizer=own)
    train(engine, range(4))
    kept = {row.name: row.how for row in flora.report().rows}
    found = weights(engine), kept, sum("momentum" in own for _, own in states(flora))
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_roles_of_a_json_are_those_of_an_optimizer_that_is_given(stage: int) -> None:
    pool = launched_pool_of(2)
    for said, given in zip(pool(by_roles, stage, True), pool(by_roles, stage, False), strict=True):
        assert all(torch.equal(said[0][name], weight) for name, weight in given[0].items())
        assert said[1:] == given[1:]
        assert said[1]["down.weight"].endswith("8 bits")
        assert "8 bits" not in said[1]["up.weight"]
