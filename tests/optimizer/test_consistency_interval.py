# SPDX-License-Identifier: Apache-2.0
"""Ranks that compare themselves after every so many steps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from flora_dist import Flora
from tests.conftest import pool_of
from tests.optimizer import consistency_runs as held
from tests.optimizer import runs


def _refused_step(run: held.HeldRun, step: int) -> str:
    try:
        run.train(range(step, step + 1))
    except ValueError as error:
        return str(error)
    return ""


def _every(interval: int, wrong_at: int) -> tuple[int, str]:
    run = held.whole(check_every=interval)
    for step in range(10):
        if step == wrong_at and dist.get_rank() == 1:
            run.optimizer.param_groups[0]["lr"] = 0.5
        if text := _refused_step(run, step):
            return step + 1, text
    return -1, ""


@pytest.mark.parametrize(("interval", "wrong_at", "seen_after"), [(1, 4, 5), (3, 4, 6), (3, 9, -1)])
def test_ranks_compare_after_every_so_many_steps(
    interval: int, wrong_at: int, seen_after: int
) -> None:
    for step, text in pool_of(2)(_every, interval, wrong_at):
        assert step == seen_after
        assert ("lr of" in text) == (seen_after > 0)


def _loaded_apart() -> tuple[int, str]:
    """Rank 1 has loaded an older checkpoint: its counters come to multiples at other times."""
    run = held.whole(check_every=3)
    run.train(range(1))
    older = copy.deepcopy(run.optimizer.state_dict())
    run.train(range(1, 2))
    if dist.get_rank() == 1:
        run.optimizer.load_state_dict(older)
    for step in range(2, 8):
        if text := _refused_step(run, step):
            return step + 1, text
    return -1, ""


def test_ranks_whose_counters_differ_still_compare_at_the_same_time() -> None:
    for step, text in pool_of(2)(_loaded_apart):
        assert step == 3
        assert "step of" in text


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


def _asked_on_rank_0() -> int:
    model = _Linear()
    optimizer = Flora(model.named_parameters(), **runs.SETTINGS, check_every=2)
    if dist.get_rank() == 0:  # torch takes a step on zeros for it
        get_optimizer_state_dict(model, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        model(runs.draw("x", step, (4, 24), torch.float32)).backward()
        optimizer.step()
    return int(optimizer.state[model.layer.weight]["step"])


def test_asking_one_rank_for_its_state_before_the_first_step_does_not_shift_the_count() -> None:
    # Counted, rank 0 would wait for the others one step early, and they for it one step late.
    assert pool_of(2)(_asked_on_rank_0) == [4, 4]


@pytest.mark.parametrize("every", [0, -1, True, 2.0, "3"])
def test_an_interval_that_cannot_be_right_is_refused(every: Any) -> None:
    runs.assert_refused(
        ["check_every", "at least 1", repr(every), "None"], lambda: runs.pair(check_every=every)
    )


def test_the_interval_is_no_setting_of_groups_or_state() -> None:
    _, checked = runs.trained(2, check_every=5)
    _, plain = runs.trained(2)
    runs.assert_equal(checked.state_dict(), plain.state_dict())
    assert "check_every" not in checked.defaults
    checked.load_state_dict(plain.state_dict())
    plain.load_state_dict(checked.state_dict())


def test_copies_keep_the_interval() -> None:
    _, optimizer = runs.trained(2, check_every=5)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin._rhythm.every, twin._rhythm._taken) == (5, 2)
