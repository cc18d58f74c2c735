# SPDX-License-Identifier: Apache-2.0
"""What programs build from the recipes of docs/hosts: their own functions, as far as they install.

Each test takes the function by which a program makes an optimizer of its config. The rest of the
program, its data and its trainer, is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from tests.hosts.small import LR, Samples, build

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {"rank": 4, "block": 16}


def trained(make: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Weights after three steps of an optimizer."""
    model = build()
    optimizer = make(model)
    assert type(optimizer) is Flora
    tokens = Samples().tokens
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def assert_same_run(make: Callable[[nn.Module], Any], expected: Callable[[nn.Module], Any]) -> None:
    wanted = trained(expected)
    for name, found in trained(make).items():
        assert torch.equal(found, wanted[name]), name


def needs(module: str, page: str) -> Any:
    return pytest.importorskip(
        module, reason=f"{module} cannot be imported (docs/hosts/{page}.md)", exc_type=ImportError
    )


def test_verl_builds_flora_of_its_config() -> None:
    theirs = needs("verl.workers.config.optimizer", "rl_and_moe")
    config = theirs.FSDPOptimizerConfig(
        lr=LR,
        weight_decay=0.1,
        optimizer="by_position",
        optimizer_impl="flora_dist",
        override_optimizer_config=SETTINGS,
    )
    assert_same_run(
        lambda model: theirs.build_optimizer(model.parameters(), config),
        lambda model: flora_dist.by_position(
            model.parameters(), lr=LR, weight_decay=0.1, **SETTINGS
        ),
    )


def test_nemo_automodel_builds_flora_of_a_target() -> None:
    theirs = needs("nemo_automodel.components.optim.optimizer", "fine_tuning")
    block = {"lr": LR, **SETTINGS}
    assert_same_run(
        lambda model: theirs.build_optimizer(model, ("flora_dist.by_position", block))[0],
        lambda model: flora_dist.by_position(model.parameters(), **block),
    )
