# SPDX-License-Identifier: Apache-2.0
"""Corpora kept as tokens: the same tokens, mapped, tokenized once; other text, damage, races."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flora_dist.trainer import corpus_cache
from flora_dist.trainer.config_data import DataConfig
from flora_dist.trainer.corpus_cache import open_corpus
from flora_dist.trainer.data import Corpus, read_corpus
from flora_dist.trainer.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Prompts and answers, so that some tokens do not count."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"q": f"question {n}", "a": f"answer {n * n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = str(tmp_path / "cache")
    return DataConfig(corpus=str(path), prompt="q", response="a", cache=cache)


def entries(config: DataConfig) -> list[Path]:
    assert config.cache is not None
    return sorted(path for path in Path(config.cache).iterdir() if path.is_dir())


def test_a_kept_corpus_has_the_tokens_of_one_that_was_read(config: DataConfig) -> None:
    plain, kept = read_corpus(config, BYTES), open_corpus(config, BYTES)
    assert kept.fingerprint == plain.fingerprint
    for ours, theirs in ((kept.train, plain.train), (kept.validation, plain.validation)):
        assert isinstance(ours.tokens, np.memmap)
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert ours.counted is not None
        assert theirs.counted is not None
        assert np.array_equal(ours.counted, theirs.counted)
        pairs = zip(ours.batch(np.arange(2)), theirs.batch(np.arange(2)), strict=True)
        assert all(one.equal(other) for one, other in pairs)


def test_a_corpus_is_tokenized_once_whatever_the_sequences(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_corpus(config, BYTES)
    monkeypatch.setattr(corpus_cache, "read_corpus", None)
    again = open_corpus(replace(config, sequence_length=32), BYTES)
    assert again.fingerprint == first.fingerprint
    assert len(again.train) > len(first.train)


def test_other_text_or_settings_are_another_entry(config: DataConfig) -> None:
    before = open_corpus(config, BYTES)
    path = Path(config.corpus)
    path.write_text(path.read_text().replace("answer 0", "answer 1"))
    after = open_corpus(config, BYTES)
    assert after.fingerprint != before.fingerprint
    open_corpus(replace(config, validation_every=5), BYTES)
    assert len(entries(config)) == 3


@pytest.mark.parametrize("name", ["train.npy", "validation-counted.npy", "manifest.json"])
def test_a_damaged_entry_is_refused(name: str, config: DataConfig) -> None:
    open_corpus(config, BYTES)
    (entry,) = entries(config)
    raw = bytearray((entry / name).read_bytes())
    raw[-1] ^= 1
    (entry / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"must be what was written there.*Remove that folder"):
        open_corpus(config, BYTES)


def test_a_process_that_is_slower_takes_what_the_faster_one_wrote(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(asked: DataConfig, tokenizer: ByteTokenizer) -> Corpus:
        monkeypatch.setattr(corpus_cache, "read_corpus", read_corpus)
        monkeypatch.setattr(corpus_cache.fcntl, "flock", lambda *_: None)
        open_corpus(asked, tokenizer)  # as another host, whose lock this one does not see
        return read_corpus(asked, tokenizer)

    monkeypatch.setattr(corpus_cache, "read_corpus", slow)
    kept = open_corpus(config, BYTES)
    assert kept.fingerprint == read_corpus(config, BYTES).fingerprint
    assert len(entries(config)) == 1


def test_an_error_leaves_no_entry_behind(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.prompt"):
        open_corpus(replace(config, prompt="none"), BYTES)
    assert entries(config) == []
    with pytest.raises(ValueError, match=r"data\.cache must be a folder that can be written"):
        open_corpus(replace(config, cache=config.corpus), BYTES)
