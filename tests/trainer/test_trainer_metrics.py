# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it trains, its groups of parameters, and a learning rate that changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flora_dist.trainer.config import Config
from flora_dist.trainer.metrics import TIMED
from flora_dist.trainer.model import build_model, sum_of_losses
from flora_dist.trainer.optimizers import build_optimizer
from flora_dist.trainer.preflight import check_run
from flora_dist.trainer.progress import open_progress
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from tests.trainer.support import metrics

Tiny = Callable[..., Config]
ALONE = World(process_rank=0, size=1, device=torch.device("cpu"))
FLORA = "optimizer={name: flora, lr: 1e-2}"


def test_a_log_has_a_line_for_every_record(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny(FLORA, "output.progress=true", "train.log_every=2")) == 0
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("Flora step ")]
    assert [line.split(",")[0] for line in lines] == [
        *("Flora step 2/6", "Flora step 3/6", "Flora step 4/6", "Flora step 6/6")
    ]
    record = metrics(tmp_path / "tiny")[-1]
    for words in (
        f"loss {record['loss']:.3f}",
        f"gradient norm {record['gradient_norm']:.3g}",
        f"perplexity {record['validation_perplexity']:.2f}",
        "tokens/s",
        "lr 0.001",
        "left 0:00:00",
    ):
        assert words in lines[-1]


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    console = Console(force_terminal=True, record=True, width=100)
    with open_progress(console, "Flora", 10) as progress:
        progress.update(5, {"loss": 2.5, "tokens_per_second": 1000.0, "eta_seconds": 1.0})
    text = console.export_text()
    assert "loss 2.500" in text
    assert "5/10" in text
    assert "Flora step" not in text


@pytest.mark.parametrize("optimizer", ["{name: flora, lr: 1e-2}", "{name: adamw, lr: 1e-2}"])
def test_metrics_are_what_they_are_called(optimizer: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(f"optimizer={optimizer}", "train.max_grad_norm=0.01")
    assert run(config) == 0
    records = metrics(tmp_path / "tiny")
    checked = check_run(tiny("output.name=other"), ALONE)
    model = build_model(config.model, checked.network, seed=0)
    inputs, labels = checked.corpus.train.batch(checked.order.global_indices(0))
    loss = sum_of_losses(model, inputs, labels) / int((labels != -100).sum())
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters())))
    assert records[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)  # before clipping
    # Step 3 is the one whose messages are counted.
    assert [r["step"] for r in records if "gradient_norm" not in r] == [3]
    for record in records:
        assert record.keys() & TIMED == TIMED - {"mfu"}  # nobody knows this device's peak
        assert record["tokens_per_second_per_device"] == record["tokens_per_second"]
        left = 6 - record["step"]
        eta = left * record["tokens"] / record["tokens_per_second"]
        assert record["eta_seconds"] == pytest.approx(eta)
        assert record["peak_memory_bytes"] > 50 * 2**20  # torch alone has more
    for record in (r for r in records if "validation_loss" in r):
        wanted = math.exp(record["validation_loss"])
        assert record["validation_perplexity"] == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["flora", "adamw"])
def test_weight_decay_shrinks_matrices_and_no_norm_or_bias(name: str, tiny: Tiny) -> None:
    def after_a_step_without_gradient(*overrides: str) -> dict[str, float]:
        options = f"optimizer={{name: {name}, lr: 0.5, weight_decay: 0.5}}"
        config = tiny(options, *overrides)
        model = build_model(config.model, check_run(config, ALONE).network, seed=0)
        optimizer = build_optimizer(config.optimizer, model.named_parameters(), seed=0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        named = model.named_parameters()
        return {n: float(p.detach().norm() / before[n].norm()) for n, p in named}

    kept = after_a_step_without_gradient()
    assert {n for n, ratio in kept.items() if ratio == pytest.approx(1.0)} == {
        n for n in kept if "norm" in n
    }
    assert all(r == pytest.approx(0.75, abs=1e-4) for n, r in kept.items() if "norm" not in n)
    shrunk = after_a_step_without_gradient("optimizer.decay=all")
    assert all(ratio == pytest.approx(0.75, abs=1e-4) for ratio in shrunk.values())


def test_a_resumed_run_takes_another_lr_only_when_asked(tiny: Tiny, tmp_path: Path) -> None:
    saving = ("schedule.name=constant", "checkpoint={every: 3, resume: auto}")
    assert run(tiny(FLORA, *saving, "train.steps=3")) == 0
    new = tiny("optimizer={name: flora, lr: 5e-3}", *saving, "train.steps=6")
    with pytest.raises(ValueError, match=r"options\.lr was 0\.01, is 0\.005.*change_lr: true"):
        run(new)
    asked = ("checkpoint={every: 3, resume: auto, change_lr: true}", "train.steps=6")
    assert run(tiny("optimizer={name: flora, lr: 5e-3}", "schedule.name=constant", *asked)) == 0
    rates = [record["lr"] for record in metrics(tmp_path / "tiny")]
    assert rates == [1e-2] * 3 + [5e-3] * 3
    # The next one has the new lr in its identity, and its weights were stepped with it.
    assert run(tiny("optimizer={name: flora, lr: 5e-3}", *saving, "train.steps=7")) == 0
    assert metrics(tmp_path / "tiny")[-1]["lr"] == 5e-3


def test_more_steps_say_what_they_do_to_the_schedule(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ("schedule={name: linear, final_ratio: 0.0}", "checkpoint={every: 2, resume: auto}")
    assert run(tiny(FLORA, *linear, "train.steps=5")) == 0
    assert "train.steps was" not in capsys.readouterr().out
    assert run(tiny(FLORA, *linear, "train.steps=9")) == 0
    said = capsys.readouterr().out
    # After 5 of 9 steps 1 - 5/8 of lr is left; after 5 of 5 nothing is.
    assert "train.steps was 5 and is 9: schedule linear now ends at step 9; the next step" in said
    assert "has lr 0.00375, which would have been 0" in said
    assert metrics(tmp_path / "tiny")[5]["lr"] == pytest.approx(0.00375)


def test_another_vocabulary_than_the_files_is_said(
    tiny: Tiny, word_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny(FLORA, "train.steps=1")) == 0
    assert "in place of" not in capsys.readouterr().out
    assert (
        run(tiny(FLORA, "train.steps=1", f"data.tokenizer={word_tokenizer}", "output.name=b")) == 0
    )
    said = capsys.readouterr().out
    assert "vocabulary 20 (the tokenizer's, in place of 257 in " in said


def test_a_corpus_must_be_named(write_config: Callable[[dict[str, Any]], Path]) -> None:
    from flora_dist.trainer.configfile import load_config

    tree = {
        "model": {"config": "configs/model/llama_tiny.json"},
        "data": {"sequence_length": 32},
        "optimizer": {"name": "flora", "lr": 1e-2},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        "output": {"name": "x"},
    }
    with pytest.raises(ValueError, match=r"data\.corpus is required and missing"):
        load_config(write_config(tree))
    del tree["data"]
    with pytest.raises(ValueError, match="data is required and missing"):
        load_config(write_config(tree))
