# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: signals, resume by the same command, what is kept and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flora_dist import checkpoint
from flora_dist.trainer import loop
from flora_dist.trainer.config import CheckpointConfig, Config
from flora_dist.trainer.run import run
from tests.trainer.support import metrics, tensor_hashes

Tiny = Callable[..., Config]
FLORA = "optimizer={name: flora, lr: 1e-2}"
AUTO = "checkpoint={every: 2, resume: auto}"
KEPT = ("step", "loss", "lr", "validation_loss", "tokens")


class Killed(RuntimeError):
    """In place of a kill: nothing of the run's own cleaning up comes after it but `finally`."""


@contextmanager
def before_step(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Do something before a step is taken, counted from 1."""
    take_step = loop._take_step

    def spied(run: loop.TrainingRun, step: int, *others: Any, **more: Any) -> Any:
        if step == number - 1:
            action()
        return take_step(run, step, *others, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_take_step", spied)
        yield


def send(number: signal.Signals) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


def die() -> None:
    raise Killed


def kept(folder: Path) -> list[dict[str, Any]]:
    return [{key: record.get(key) for key in KEPT} for record in metrics(folder)]


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def files_of(folder: Path) -> Any:
    """Hashes of the newest checkpoint's tensors: weights and state, bit for bit."""
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    return tensor_hashes(newest)


# ---- signals


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(
    asynchronous: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind = f"checkpoint.asynchronous={asynchronous}"
    options = [FLORA, AUTO, behind, "schedule.warmup_steps=2"]
    assert run(tiny(*options, "output.name=whole")) == 0
    capsys.readouterr()
    # After an odd number of steps: not when a checkpoint is due.
    with before_step(4, send(signal.SIGTERM)):
        assert run(tiny(*options)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "SIGTERM" in line]
    place = tmp_path / "tiny" / "checkpoints" / "step-00000003"
    assert said == [
        f"SIGTERM: Flora stopped after step 3; saved in {place}, from where checkpoint.resume: "
        "auto goes on"
    ]
    assert steps_of(tmp_path / "tiny") == ["step-00000002", "step-00000003"]
    assert run(tiny(*options)) == 0
    assert f"going on from {place}" in capsys.readouterr().out
    assert kept(tmp_path / "tiny") == kept(tmp_path / "whole")
    assert files_of(tmp_path / "tiny") == files_of(tmp_path / "whole")
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["measured"]["tokens"] == 6 * 8 * 32


def test_ctrl_c_saves_too_and_its_exit_code_stays(tiny: Tiny, tmp_path: Path) -> None:
    with before_step(4, send(signal.SIGINT)):
        assert run(tiny(AUTO)) == 130
    assert steps_of(tmp_path / "tiny") == ["step-00000002", "step-00000003"]


def test_a_signal_without_checkpoints_says_that_nothing_is_saved(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with before_step(2, send(signal.SIGTERM)):
        assert run(tiny()) == 0
    assert "SIGTERM: AdamW stopped after step 1; nothing of it is saved" in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_more_signals_do_not_tear_a_save(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def signalled(*args: Any, **kwargs: Any) -> Path:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        path = save(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return path

    monkeypatch.setattr(checkpoint, "save", signalled)
    assert run(tiny(FLORA, AUTO)) == 0  # the first signal counts: SIGTERM
    assert steps_of(tmp_path / "tiny") == ["step-00000002"]
    assert files_of(tmp_path / "tiny")


def test_where_torchrun_restarts_a_process_that_was_not_asked_itself_wants_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flora_dist.trainer.interrupt import StopRequest

    asked, other = StopRequest(), StopRequest()
    asked._note(signal.SIGTERM, None)
    for stop in (asked, other):
        assert stop.exit_code == 0
        assert stop.agree(interrupted=0, preempted=1)
    assert (asked.exit_code, other.exit_code) == (0, 0)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert (asked.exit_code, other.exit_code) == (0, 75)
    assert other.agree(interrupted=1, preempted=1)
    assert other.exit_code == 130


# ---- the same command again


def test_a_run_that_died_goes_on_from_its_newest_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    options = [FLORA, AUTO]
    assert run(tiny(*options, "output.name=whole")) == 0
    for number in (2, 4, 6):  # before there is a checkpoint, behind one, and before the last
        with before_step(number, die), pytest.raises(Killed):
            run(tiny(*options))
        with (tmp_path / "tiny" / "metrics.jsonl").open("a") as file:
            file.write('{"step": ')  # a kill may cut the last line short
    assert run(tiny(*options)) == 0
    assert kept(tmp_path / "tiny") == kept(tmp_path / "whole")
    assert files_of(tmp_path / "tiny") == files_of(tmp_path / "whole")


def test_a_finished_run_is_left_alone(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny(AUTO)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("*")}
    capsys.readouterr()
    assert run(tiny(AUTO)) == 0
    assert "is finished: nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("*")} == before


def test_a_run_that_died_in_its_comparison_does_only_that_again(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [FLORA, AUTO, "compare={name: adamw, lr: 1e-2}"]
    seen: list[int] = []

    def die_the_second_time() -> None:
        seen.append(0)
        if len(seen) == 2:
            raise Killed

    with before_step(3, die_the_second_time), pytest.raises(Killed):
        run(tiny(*options))
    first = metrics(tmp_path / "tiny")
    capsys.readouterr()
    assert run(tiny(*options)) == 0
    assert "going on from" in capsys.readouterr().out
    assert metrics(tmp_path / "tiny") == first
    assert [r["step"] for r in metrics(tmp_path / "tiny" / "compare")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "tiny" / "summary.json").read_text())["adamw"]["finished"]


def test_auto_and_overwrite_never_remove_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    with before_step(4, send(signal.SIGTERM)):
        assert run(tiny(AUTO)) == 0
    assert run(tiny(AUTO, "output.overwrite=true", "checkpoint.keep=null")) == 0
    assert steps_of(tmp_path / "tiny") == [f"step-0000000{n}" for n in (2, 3, 4, 6)]
    assert [r["step"] for r in metrics(tmp_path / "tiny")] == [1, 2, 3, 4, 5, 6]


def test_auto_spares_the_results_of_a_run_that_saved_nothing(tiny: Tiny, tmp_path: Path) -> None:
    assert run(tiny()) == 0
    before = metrics(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"has the results of 6 steps and no checkpoint"):
        run(tiny(AUTO))
    assert metrics(tmp_path / "tiny") == before
    assert run(tiny(AUTO, "output.overwrite=true", "train.steps=2")) == 0
    assert [r["step"] for r in metrics(tmp_path / "tiny")] == [1, 2]


def test_auto_spares_a_folder_that_is_no_run(tiny: Tiny, tmp_path: Path) -> None:
    precious = tmp_path / "tiny" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("do not lose")
    with pytest.raises(ValueError, match="so something else wrote it"):
        run(tiny(AUTO, "output.overwrite=true"))
    assert [p.name for p in precious.parent.iterdir()] == ["thesis.tex"]


def test_a_run_that_exists_is_refused_with_the_way_to_go_on(tiny: Tiny) -> None:
    assert run(tiny("train.steps=1")) == 0
    with pytest.raises(ValueError, match=r"or go on with it: checkpoint.resume: auto"):
        run(tiny("train.steps=1"))


def test_auto_without_saving_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Set checkpoint.every to a number of steps"):
        CheckpointConfig(resume="auto")


# ---- what is kept, and what does not load


def test_the_last_step_is_saved_and_the_newest_two_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    assert run(tiny("checkpoint.every=1", "train.steps=4", "output.name=two")) == 0
    assert steps_of(tmp_path / "two") == ["step-00000003", "step-00000004"]
    every = "checkpoint={every: 4, keep: null}"
    assert run(tiny(every, "train.steps=5", "output.name=all")) == 0
    assert steps_of(tmp_path / "all") == ["step-00000004", "step-00000005"]


def test_bfloat16_arithmetic_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    options = [FLORA, AUTO, "train.precision=bfloat16"]
    assert run(tiny(*options, "output.name=whole")) == 0
    with before_step(4, send(signal.SIGTERM)):
        assert run(tiny(*options)) == 0
    assert run(tiny(*options)) == 0
    assert kept(tmp_path / "tiny") == kept(tmp_path / "whole")
    assert files_of(tmp_path / "tiny") == files_of(tmp_path / "whole")


def test_dropout_goes_on_where_it_was(tiny: Tiny, tmp_path: Path) -> None:
    network = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(network | dropout))
    options = [FLORA, AUTO, f"model.config={path}"]
    assert run(tiny(*options, "output.name=whole")) == 0
    with before_step(4, send(signal.SIGTERM)):
        assert run(tiny(*options)) == 0
    assert run(tiny(*options)) == 0
    assert kept(tmp_path / "tiny") == kept(tmp_path / "whole")
    path.write_text(json.dumps(network | dict.fromkeys(dropout, 0.0)))
    assert run(tiny(*options, "output.name=without")) == 0
    # The mutation: dropout must be seen to be on.
    assert kept(tmp_path / "without")[0] != kept(tmp_path / "whole")[0]


def test_a_metrics_line_that_is_no_record_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with before_step(4, send(signal.SIGTERM)):
        assert run(tiny(AUTO)) == 0
    log = tmp_path / "tiny" / "metrics.jsonl"
    log.write_text("?\n" + log.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl' must be a record"):
        run(tiny(AUTO))
    assert log.read_text().startswith("?\n")
