# SPDX-License-Identifier: Apache-2.0
"""The paper's two set-ups in configs/paper, end to end on random tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

PAPER = Path(__file__).parents[2] / "configs" / "paper"
PAIRS = [{"source": f"the number {n} is here", "target": f"{n}"} for n in range(20)]
PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu"}
SMALL = ["steps=2", "target_tokens=6", 'flora={"rank": 2, "momentum": "flora", "kappa": 2}']


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", PAPER / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


finetune = _module()


def _folder(tmp_path: Path, name: str) -> str:
    tokenizer, folder = ByT5Tokenizer(extra_ids=0), tmp_path / "model"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    if name == "gpt2_translation":
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, bos_token_id=1, **sizes)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        t5 = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, **sizes)
        t5.decoder_start_token_id = 0
        T5ForConditionalGeneration(t5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _data(tmp_path: Path) -> list[str]:
    found = []
    for name, pairs in (("train", PAIRS), ("test", PAIRS[:2])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        found += [f"--{name}", str(path)]
    return found


@pytest.mark.parametrize("name", ["t5_summarisation", "gpt2_translation"])
def test_a_set_up_of_the_paper_trains_answers_and_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The score is its package's where that is installed, as by the extra ``paper``."""
    metric = json.loads((PAPER / f"{name}.json").read_text())["metric"]
    heard: list[tuple[list[str], list[str], dict[str, float]]] = []
    is_installed = importlib.util.find_spec(PACKAGES[metric]) is not None
    own = finetune.METRICS[metric] if is_installed else lambda *_: {metric: 12.5}

    def score(said: list[str], wanted: list[str]) -> dict[str, float]:
        heard.append((said, wanted, own(said, wanted)))
        return heard[-1][2]

    monkeypatch.setitem(finetune.METRICS, metric, score)
    out = tmp_path / "out"
    changes = [word for change in SMALL for word in ("--set", change)]
    command = [str(PAPER / f"{name}.json"), "--model", _folder(tmp_path, name), *_data(tmp_path)]
    assert finetune.main([*command, "--out", str(out), *changes]) == 0
    shown = capsys.readouterr().out
    said, wanted, scores = heard[-1]
    assert wanted == ["0", "1"]
    assert scores
    assert all(f"{key} {value:.2f}" in shown for key, value in scores.items())
    written = json.loads((out / "scores.json").read_text())
    assert written == {"scores": scores, "answers": said}


def test_the_summaries_are_trained_by_sketches_of_sixteen_micro_batches(tmp_path: Path) -> None:
    experiment = finetune.read_experiment(PAPER / "t5_summarisation.json", SMALL)
    assert (experiment.micro_batch, experiment.accumulation) == (1, 16)
    model, tokenizer, is_decoder = finetune.load(_folder(tmp_path, "t5_summarisation"))
    encoder = finetune.Encoder(experiment, tokenizer, is_decoder=is_decoder)
    trainer = finetune.train(experiment, model, encoder, PAIRS, str(tmp_path / "out"))
    optimizer = trainer.optimizer.optimizer
    assert optimizer.report().level == "compressed"
    assert any(row.is_compressed for row in optimizer.report().rows)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_a_decoder_is_taught_the_target_alone() -> None:
    experiment = finetune.read_experiment(PAPER / "gpt2_translation.json", [])
    encoder = finetune.Encoder(experiment, ByT5Tokenizer(extra_ids=0), is_decoder=True)
    batch = encoder.collate([encoder.example(pair) for pair in PAIRS[:2] + PAIRS[-1:]])
    for row, pair in zip(batch["labels"], PAIRS[:2] + PAIRS[-1:], strict=True):
        counted = row[row != finetune.IGNORED]
        assert counted.tolist() == encoder.target(pair)
        assert counted[-1] == 1  # the end
    assert batch["attention_mask"].sum(1).tolist() == [
        len(encoder.example(pair)["input_ids"]) for pair in PAIRS[:2] + PAIRS[-1:]
    ]


@pytest.mark.parametrize(
    ("metric", "same"), [("rouge", {"rouge1", "rouge2", "rougeL"}), ("bleu", {"bleu"})]
)
def test_a_score_is_its_packages_or_says_what_to_install(metric: str, same: set[str]) -> None:
    texts = ["a small cat sat on the mat today"]
    if importlib.util.find_spec(PACKAGES[metric]) is None:
        with pytest.raises(ValueError, match=r"pip install 'flora-dist\[paper\]'"):
            finetune.METRICS[metric](texts, texts)
        return
    assert finetune.METRICS[metric](texts, texts) == {key: pytest.approx(100) for key in same}


def test_data_and_set_ups_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got rnak"):
        finetune.read_experiment(PAPER / "t5_summarisation.json", ["rnak=3"])
    (tmp_path / "lines.jsonl").write_text('{"source": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* has source, text"):
        finetune.read_pairs(tmp_path / "lines.jsonl")
