# SPDX-License-Identifier: Apache-2.0
"""kill -9 of one training process at a random step: the run finishes as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.worker_kills import SETUPS, STEPS, Kill, Run, random_kills, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The uninterrupted runs, once each is asked for."""
    folder = tmp_path_factory.mktemp("whole")
    return {setup: train(setup, folder / setup, []) for setup in SETUPS}


@pytest.mark.timeout(900)
def test_kills_of_one_run_leave_its_loss_curve_bit_for_bit(tmp_path: Path) -> None:
    # Either process, the second time in a run that had already gone on from a checkpoint. One more
    # kill is one more start of torch, 10 s, and shows nothing else.
    setup = "ddp, saved behind"
    whole = train(setup, tmp_path / "whole", [])
    assert [record["step"] for record in whole.curve] == list(range(1, STEPS + 1))
    kills = sorted(random_kills(2, seed=4), key=lambda kill: kill.line)
    run = train(setup, tmp_path / "killed", kills)
    assert run.curve == whole.curve
    assert [kill.victim for kill in kills] == [0, 1]
    assert run.starts == 3
    # Behind the sixth step there is a checkpoint beside one that may be just being written.
    assert min(kill.line for kill in kills) > 6
    assert len(run.resumed) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "kill"), list(enumerate(random_kills(20, seed=0))))
def test_a_killed_run_has_the_curve_of_the_uninterrupted_one_bit_for_bit(
    number: int, kill: Kill, whole: dict[str, Run], tmp_path: Path
) -> None:
    setup = list(SETUPS)[number % len(SETUPS)]
    run = train(setup, tmp_path / "killed", [kill])
    assert run.curve == whole[setup].curve
    assert run.starts == 2
