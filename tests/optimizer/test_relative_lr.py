# SPDX-License-Identifier: Apache-2.0
"""``scale_parameter="relative"``: an lr that grows with a matrix, and is AdamW's at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora, checkpoint
from flora_dist.core.parameters.report import Report
from flora_dist.core.step import matrix
from flora_dist.core.step.batch import Batch, Moment
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs

STEPS = 5
RELATIVE = {"scale_parameter": "relative"}
LR = 0.05


def _pair(**settings: Any) -> tuple[runs.Parameters, Flora]:
    return runs.pair(**{"lr": LR, **RELATIVE, **settings})


@pytest.mark.parametrize("momentum", ["blend", "flora", "flora_strict", "none"])
def test_steps_are_the_reference(momentum: str) -> None:
    # Weights grow to more than twice their size, where lr stops growing with them.
    settings = {**runs.SETTINGS, "lr": 5.0, **RELATIVE, "momentum": momentum}
    weights, optimizer = _pair(**settings)
    start = runs.values(weights)
    oracle = reference_of(Case(settings=settings), start)
    for step in range(STEPS):
        runs.train(optimizer, weights, [step])
        oracle.step({name: weight.grad for name, weight in weights.items()})
    assert distances(start, dict(oracle.weights), runs.values(weights))[1] < 1e-11
    wide = weights["wide"].detach()
    assert wide.square().mean() > (2 * 2) * start["wide"].square().mean()


def test_a_start_that_is_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(
        now: Moment, square_sum_H: Tensor, start_H: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        return whole(now, square_sum_H, torch.zeros_like(start_H), batch)

    whole = matrix.relative_rate_of
    monkeypatch.setattr(matrix, "relative_rate_of", forgetful)
    with pytest.raises(AssertionError):
        test_steps_are_the_reference("none")


def test_the_start_is_kept_by_matrix_and_counted_and_vectors_have_none() -> None:
    weights, optimizer = _pair()
    report: Report = optimizer.report()
    start = runs.values(weights)
    runs.train(optimizer, weights, [0])
    shapes = {n: optimizer.state[w].get("start", torch.empty(0)).shape for n, w in weights.items()}
    assert shapes["wide"] == (1,)
    assert shapes["experts"] == (3, 1)
    assert shapes["bias"] == (0,)
    kept = optimizer.state[weights["wide"]]["start"]
    torch.testing.assert_close(kept, start["wide"].square().mean().sqrt().view(1))
    assert report.state_bytes == runs.state_bytes(optimizer)


def test_a_checkpoint_keeps_the_start(tmp_path: Path) -> None:
    modules = [runs.Module(), runs.Module()]
    settings = {**runs.SETTINGS, "lr": LR, **RELATIVE}
    optimizers = [Flora(module.named_parameters(), **settings) for module in modules]
    runs.train(optimizers[0], dict(modules[0].named_parameters()), range(3))
    checkpoint.save(tmp_path, modules[0], optimizers[0], step=3)
    checkpoint.load(tmp_path, modules[1], optimizers[1])
    for module, optimizer in zip(modules, optimizers, strict=True):
        runs.train(optimizer, dict(module.named_parameters()), [3])
    runs.assert_equal(dict(modules[1].state_dict()), dict(modules[0].state_dict()))


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale_parameter must be True, False or 'relative'; got"):
        Flora([nn.Parameter(torch.zeros(4, 8))], scale_parameter="initial")
