# SPDX-License-Identifier: Apache-2.0
"""A loss, a weight or a state that is NaN or infinite: the run ends, and what was saved stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist import checkpoint
from flora_dist.trainer import loop
from flora_dist.trainer.config import Config
from flora_dist.trainer.run import run
from tests.trainer.ragged import tiny_model
from tests.trainer.support import Workers, metrics

Tiny = Callable[..., Config]
SAVING = "checkpoint={every: 1, keep: 2}"
RARELY = ("train.log_every=100", "evaluation.every=100")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Before a step, counted from 1, make the embedding of a token NaN that the text has not."""

    def poison(number: int) -> None:
        take_step = loop._take_step

        def poisoning(run: loop.TrainingRun, step: int, *others: Any, **more: Any) -> Any:
            if step == number - 1:
                with torch.no_grad():
                    run.spread.module.get_input_embeddings().weight[200] = torch.nan
            return take_step(run, step, *others, **more)

        monkeypatch.setattr(loop, "_take_step", poisoning)

    return poison


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").glob("step-*"))


def finite_checkpoints(config: Config) -> list[int]:
    """The steps of the checkpoints of a run; each must load, and hold finite weights."""
    folder = Path(config.output.folder, config.output.name)
    for step in steps_saved(folder):
        model = tiny_model(config)
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint.load(folder / "checkpoints" / f"step-{step:08d}", model, optimizer)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    return steps_saved(folder)


@pytest.mark.parametrize("logged", [(), RARELY])
def test_a_run_that_diverges_ends_with_1_and_its_last_finite_checkpoints_stay(
    logged: tuple[str, ...], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # It went on to the end with exit code 0, and `keep` removed every checkpoint that was sound.
    config = tiny("optimizer.lr=1e25", SAVING, "train.steps=20", *logged)
    assert run(config) == 1
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())["measured"]
    assert not summary["finished"]
    saved = finite_checkpoints(config)
    assert saved == [summary["steps"] - 1]  # one step of this size is finite, the next one is not
    said = capsys.readouterr().err
    assert f"with AdamW, {summary['not_finite']}. No checkpoint of it is written" in said
    assert f"The last from before is {tmp_path / 'tiny/checkpoints'}/step-{saved[0]:08d}" in said


def test_a_run_that_may_go_on_does_and_still_saves_nothing_that_is_not_finite(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny("optimizer.lr=1e25", SAVING, "train.stop_at_nan=false")
    with pytest.warns(UserWarning, match="no checkpoint of them is written"):
        assert run(config) == 0
    assert [record["step"] for record in metrics(tmp_path / "tiny")] == [1, 2, 3, 4, 5, 6]
    assert 0 < max(finite_checkpoints(config)) < 6


def test_weights_that_no_loss_betrays_are_not_saved(
    tiny: Tiny, tmp_path: Path, poisoned: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(4)
    config = tiny(SAVING)
    assert run(config) == 1
    assert finite_checkpoints(config) == [2, 3]
    assert metrics(tmp_path / "tiny")[-1]["loss"] is not None
    assert "weights or optimizer state are not finite after step 4." in capsys.readouterr().err


def test_a_validation_loss_that_is_not_finite_ends_the_run_too(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "validation_loss", lambda *_, **__: float("inf"))
    assert run(tiny(SAVING)) == 1  # tests/trainer/tiny.yaml evaluates every 3 steps
    assert steps_saved(tmp_path / "tiny") == [1, 2]
    assert "the validation loss of step 3 is inf" in capsys.readouterr().err


def test_a_run_without_checkpoints_ends_at_nan_as_well(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny("optimizer.lr=1e25", "train.steps=20", *RARELY)) == 1
    (line,) = metrics(tmp_path / "tiny")
    assert line["step"] < 20
    assert line["loss"] is None
    said = capsys.readouterr().err
    assert f"with AdamW, the training loss of step {line['step']} is " in said
    assert "None was saved before it." in said


def test_a_comparison_that_diverges_is_told_beside_the_runs_own_results(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny("compare={name: adamw, lr: 1e25}", "optimizer={name: flora, lr: 1e-2}")) == 1
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["measured"]["finished"]
    assert not summary["adamw"]["finished"]
    assert "with AdamW, the training loss" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "saved"), [("nan.saving", [2, 3]), ("nan.between", [])])
def test_a_loss_that_is_nan_on_one_process_alone_ends_all_of_them_before_the_next_save_and_step(
    name: str, saved: list[int], workers: Workers
) -> None:
    folder = workers(2, "saved")
    assert [(folder / f"{name}.{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert steps_saved(folder / name) == saved
    (line,) = metrics(folder / name)
    assert (line["step"], line["loss"]) == (4, None)
