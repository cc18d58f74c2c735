# SPDX-License-Identifier: Apache-2.0
"""Small corpora, the tiny config, and the shared multi-process runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flora_dist.trainer import summary
from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import load_config
from tests.trainer.support import TINY, Workers, tiny_overrides

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"),
    *("while", "seven", "wizards", "box", "with", "five", "jugs"),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads over matrices of 32 rows wait for each other, seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave out summary.png, most of the time of a short one, but where a test looks at it."""
    if request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr(summary, "_draw", lambda *_: None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl corpus of 200 short documents of different lengths."""
    words = random.Random(0)
    documents = [" ".join(words.choices(WORDS, k=words.randint(3, 60))) for _ in range(200)]
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """The tiny config on the small corpus, writing below tmp_path, with further overrides."""

    def make(*overrides: str) -> Config:
        return load_config(TINY, tiny_overrides(corpus, tmp_path, *overrides))

    return make


@pytest.fixture(scope="session")
def workers(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Workers:
    """Results of the multi-process cases by world size."""
    return Workers(corpus, tmp_path_factory.mktemp("workers"))


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a mapping as a config file."""

    def write(tree: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer folder with 20 tokens: two special ones and words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<end>", *dict.fromkeys(WORDS), "one", "two"]
    words = {word: number for number, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.save_pretrained(folder)
    return folder
