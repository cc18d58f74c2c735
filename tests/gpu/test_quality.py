# SPDX-License-Identifier: Apache-2.0
"""The training runs of ``launch/gpu.sh`` and their table, at toy size on the CPU."""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import gpu_table
from tests.gpu import quality
from tests.gpu.decoder import SHAPES, TOY, Decoder
from tests.gpu.text import python_text
from tests.harness.launched import ROOT

ROWS = ("AdamW", "Flora, gradients 64 x 4 bits")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing by two threads, which wait long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_runs_that_have_ended_are_kept_and_only_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "ROWS", {name: quality.ROWS[name] for name in ROWS})
    kept = tmp_path / "runs"
    whole = quality.quality("60m", True, kept)
    assert whole["faults"] == []
    assert len(whole["runs"]) == 4
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # killed while it was written
    trained: list[tuple[str, float]] = []
    train = quality.train

    def counted(plan: quality.Plan, text: Any, row: str, rate: float) -> dict[str, Any]:
        trained.append((row, rate))
        return train(plan, text, row, rate)

    monkeypatch.setattr(quality, "train", counted)
    again = quality.quality("60m", True, kept)
    assert trained == [(ROWS[1], quality.REHEARSED.rates[1])]
    # The same seed, text and order: the same numbers.
    assert [run["loss"] for run in again["runs"]] == [run["loss"] for run in whole["runs"]]


def test_a_row_that_no_learning_rate_teaches_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "ROWS", {name: quality.ROWS[name] for name in ROWS})
    rates = quality.REHEARSED.rates
    losses = {ROWS[0]: (math.nan, 2.0), ROWS[1]: (math.nan, 3.5)}
    runs = [
        {"row": row, "lr": rate, "first loss": 3.0, "loss": loss}
        for row in ROWS
        for rate, loss in zip(rates, losses[row], strict=True)
    ]
    kept = tmp_path / "runs"
    kept.write_text("".join(json.dumps(run) + "\n" for run in runs))
    found = quality.quality("60m", True, kept)
    assert found["faults"] == [f"{ROWS[1]}: no learning rate lowers the loss"]


def test_the_decoder_is_the_llama_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOY.words,
        hidden_size=TOY.width,
        intermediate_size=TOY.inner,
        num_hidden_layers=TOY.layers,
        num_attention_heads=TOY.heads,
        rms_norm_eps=1e-6,
    )
    theirs, ours = LlamaForCausalLM(config), Decoder(TOY)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(TOY.words, (2, 17))
    # The order of sums differs: some roundings of a loss of 6.
    torch.testing.assert_close(
        ours(tokens), theirs(input_ids=tokens, labels=tokens).loss, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_networks_are_those_of_the_configs(name: str) -> None:
    config = json.loads((ROOT / "configs" / "model" / f"llama_{name}.json").read_text())
    shape = SHAPES[name]
    assert shape.words == config["vocab_size"]
    assert shape.width == config["hidden_size"]
    assert shape.inner == config["intermediate_size"]
    assert (shape.layers, shape.heads) == (
        config["num_hidden_layers"],
        config["num_attention_heads"],
    )


def test_the_tokens_of_the_text_spell_the_files() -> None:
    text = python_text(words=600, most_bytes=50_000)
    assert len(text.words) == 600
    first = b"".join(text.words[token] for token in text.validation)
    library = Path(sysconfig.get_paths()["stdlib"])
    assert first == min(library.rglob("*.py")).read_bytes()
    # Frequent words are one token each.
    assert len(text.train) < sum(len(text.words[token]) for token in text.train) / 2


def test_the_table_has_each_row_at_its_best_rate_beside_adamw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"AdamW": (3.5, 3.25), "Flora, default": (3.125, math.nan)}
    runs = [
        {"row": row, "lr": rate, "loss": loss, "state bytes per parameter": 0.5, "tokens/s": 1e5}
        for row in losses
        for rate, loss in zip((1e-3, 2e-3), losses[row], strict=True)
    ]
    found = {"seconds": 1.0, "device": "a card", "torch": "2.13", "rehearsal": False, "faults": []}
    (tmp_path / "60m.json").write_text(
        json.dumps({**found, "network": "60m", "tokens": 1000, "runs": runs})
    )
    monkeypatch.setattr("sys.argv", ["gpu_table", str(tmp_path)])
    assert gpu_table.main() == 0
    said = capsys.readouterr().out
    assert "60m: passed, 1.0 s, a card, torch 2.13\nnot there: bits, runs, records, graph" in said
    rows = {line.split("  ")[0]: line.split() for line in said.splitlines()}
    assert rows["AdamW"][-3:-1] == ["3.2500", "+0.0000"]
    assert rows["Flora, default"][-3:-1] == ["3.1250", "-0.1250"]


def test_a_folder_without_results_is_refused_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_table", str(tmp_path)])
    assert gpu_table.main() == 2
    assert "Name the one that ./launch/gpu.sh wrote" in capsys.readouterr().err
