# SPDX-License-Identifier: Apache-2.0
"""The paper's two kinds of run on data of your own: T5 summarises, GPT-2 translates.

    pip install 'flora-dist[paper]'
    python configs/paper/finetune.py configs/paper/t5_summarisation.json --model FOLDER \
        --train train.jsonl --test test.jsonl --out runs/summaries

A line of the data is {"source": "...", "target": "..."}. FOLDER is what `save_pretrained` has
written, with its tokenizer. The two JSON files have the numbers of the authors' scripts; what they
were run on, XSum and IWSLT17, is not here. At the end the test set is answered greedily and scored:
ROUGE by Google's rouge-score, BLEU by sacrebleu, in scores.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from flora_dist import Flora
from flora_dist.transformers import FloraTrainer

IGNORED = -100
"""A label that does not count, in transformers' losses."""
Pair = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One of the paper's set-ups."""

    metric: str
    """rouge or bleu."""
    before: str = ""
    """In front of each source."""
    after: str = ""
    """Behind it."""
    source_tokens: int
    target_tokens: int
    micro_batch: int
    accumulation: int = 1
    """Micro-batches per step."""
    steps: int
    schedule: str = "constant"
    lr: float
    flora: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``Flora.paper``."""
    gradients: str = "dense"
    """"compressed": the paper's Algorithm 1, micro-batches are summed as sketches."""
    seed: int = 42


def read_experiment(path: Path, changes: Sequence[str]) -> Experiment:
    """A set-up from its file, with "key=value" changes.

    Raises:
        ValueError: a key that is none.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    for change in changes:
        key, _, value = change.partition("=")
        values[key] = json.loads(value)
    known = {each.name for each in fields(Experiment)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"a set-up has the keys {', '.join(sorted(known))}; got {', '.join(unknown)}. "
            "Correct the file, or --set."
        )
    return Experiment(**values)


def read_pairs(path: Path) -> list[Pair]:
    """Lines of {"source": ..., "target": ...}.

    Raises:
        ValueError: a line without both, by its number.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        pair = json.loads(line)
        if not {"source", "target"} <= set(pair):
            raise ValueError(
                f"each line must have 'source' and 'target'; line {number} of {str(path)!r} has "
                f"{', '.join(pair) or 'none'}. Rename its keys."
            )
        pairs.append(pair)
    return pairs


class Encoder:
    """Pairs as token ids, for a model that reads the source apart or in front of the target."""

    def __init__(self, experiment: Experiment, tokenizer: Any, *, is_decoder: bool) -> None:
        self._experiment, self._tokenizer, self.is_decoder = experiment, tokenizer, is_decoder
        self.padding = tokenizer.eos_token_id if tokenizer.pad_token is None else 0
        if tokenizer.pad_token is not None:
            self.padding = tokenizer.pad_token_id

    def source(self, pair: Pair) -> list[int]:
        """What the model is given; a decoder without the end that would stop it."""
        own = self._experiment
        ids = self._ids(own.before + pair["source"] + own.after, own.source_tokens)
        if self.is_decoder and ids and ids[-1] == self._tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids

    def target(self, pair: Pair) -> list[int]:
        """What it should say, with its end."""
        ids = self._ids(pair["target"], self._experiment.target_tokens)
        end = self._tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def example(self, pair: Pair) -> dict[str, list[int]]:
        """Inputs and labels; a decoder reads both, and its source is not counted."""
        source, target = self.source(pair), self.target(pair)
        if not self.is_decoder:
            return {"input_ids": source, "labels": target}
        return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}

    def collate(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """A batch, padded on the right."""

        def padded(key: str, value: int) -> Tensor:
            rows = [torch.tensor(each[key]) for each in examples]
            return pad_sequence(rows, batch_first=True, padding_value=value)

        inputs = padded("input_ids", self.padding)
        ones = [{"ones": [1] * len(each["input_ids"])} for each in examples]
        mask = pad_sequence(
            [torch.tensor(each["ones"]) for each in ones], batch_first=True, padding_value=0
        )
        return {
            "input_ids": inputs,
            "attention_mask": mask,
            "labels": padded("labels", IGNORED),
        }

    def _ids(self, text: str, longest: int) -> list[int]:
        return list(self._tokenizer(text, truncation=True, max_length=longest)["input_ids"])


def load(folder: str) -> tuple[torch.nn.Module, Any, bool]:
    """Model, tokenizer, and whether the model is a decoder alone; from a folder, nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    is_decoder = not AutoConfig.from_pretrained(folder, local_files_only=True).is_encoder_decoder
    kind = AutoModelForCausalLM if is_decoder else AutoModelForSeq2SeqLM
    return kind.from_pretrained(folder, local_files_only=True), tokenizer, is_decoder


def train(
    experiment: Experiment,
    model: torch.nn.Module,
    encoder: Encoder,
    pairs: Sequence[Pair],
    out: str,
) -> Trainer:
    """Train by ``Flora.paper``, its gradients dense or as sketches."""
    optimizer = Flora.paper(
        model.named_parameters(), experiment.lr, seed=experiment.seed, **experiment.flora
    )
    trainer = FloraTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=out,
            max_steps=experiment.steps,
            per_device_train_batch_size=experiment.micro_batch,
            gradient_accumulation_steps=experiment.accumulation,
            lr_scheduler_type=experiment.schedule,
            max_grad_norm=0.0,
            seed=experiment.seed,
            logging_steps=max(1, experiment.steps // 20),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=[encoder.example(pair) for pair in pairs],
        data_collator=encoder.collate,
        optimizers=(optimizer, None),
        gradients=experiment.gradients,
        gradient_bits=32,  # the paper's sketches: its Gaussian projection is no rotation
    )
    trainer.train()
    return trainer


@torch.no_grad()
def answers(
    experiment: Experiment, model: Any, tokenizer: Any, encoder: Encoder, pairs: Sequence[Pair]
) -> list[str]:
    """What the model says to each source, greedily, one after the other."""
    model.eval()
    said = []
    for pair in pairs:
        inputs = torch.tensor([encoder.source(pair)], device=model.device)
        ids = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=experiment.target_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=encoder.padding,
        )[0]
        fresh = ids[inputs.shape[1] :] if encoder.is_decoder else ids
        said.append(tokenizer.decode(fresh, skip_special_tokens=True).strip())
    return said


def rouge(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Mean F of ROUGE-1, -2 and -L, times 100, with stems."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = _module("rouge_score.rouge_scorer").RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(target, text) for text, target in zip(said, wanted, strict=True)]
    return {kind: 100 * sum(each[kind].fmeasure for each in found) / len(found) for kind in kinds}


def bleu(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU, 0 to 100, by sacrebleu's own tokens."""
    return {"bleu": _module("sacrebleu").corpus_bleu(list(said), [list(wanted)]).score}


METRICS = {"rouge": rouge, "bleu": bleu}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"scores need the package of {name}, which is not installed. "
            "Run pip install 'flora-dist[paper]'."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Train, answer, score; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--model", required=True, help="a folder of save_pretrained")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--test", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    args = parser.parse_args(argv)
    experiment = read_experiment(args.experiment, args.set)
    pairs, tests = read_pairs(args.train), read_pairs(args.test)
    score = METRICS[experiment.metric]
    score(["a"], ["a"])  # what is not installed is said before hours of training
    model, tokenizer, is_decoder = load(args.model)
    encoder = Encoder(experiment, tokenizer, is_decoder=is_decoder)
    trainer = train(experiment, model, encoder, pairs, str(args.out))
    said = answers(experiment, trainer.model, tokenizer, encoder, tests)
    scores = score(said, [pair["target"] for pair in tests])
    text = json.dumps({"scores": scores, "answers": said}, indent=1, ensure_ascii=False)
    (args.out / "scores.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(", ".join(f"{name} {value:.2f}" for name, value in scores.items()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
