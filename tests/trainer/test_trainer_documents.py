# SPDX-License-Identifier: Apache-2.0
"""Prompts, conversations, files of tokens, validation of its own, and broken files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from flora_dist.cli import main
from flora_dist.trainer.config import Config
from flora_dist.trainer.config_data import DataConfig
from flora_dist.trainer.data import IGNORED, Packed, read_corpus
from flora_dist.trainer.run import run
from flora_dist.trainer.tokenizer import ByteTokenizer, FolderTokenizer
from tests.trainer.support import metrics

Tiny = Callable[..., Config]
BYTES = ByteTokenizer()
TEMPLATE = (
    "{% for m in messages %}{{ 'one ' if m.role == 'user' else 'two ' }}{{ m.content }}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'two ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'one ' + m.content + ' <end> ' }}"
    "{% else %}{{ 'two ' }}{% generation %}{{ m.content + ' <end>' }}{% endgeneration %}"
    "{{ ' ' }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ 'one ' if loop.last else 'two ' }}{{ m.content }} {% endfor %}"
)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def templated(word_tokenizer: Path, tmp_path: Path) -> Callable[[str], FolderTokenizer]:
    """The word tokenizer with a chat template."""

    def make(template: str) -> FolderTokenizer:
        folder = Path(shutil.copytree(word_tokenizer, tmp_path / f"t{hash(template)}"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return FolderTokenizer(folder)

    return make


def learned(packed: Packed) -> list[int]:
    """The labels that count, of all sequences."""
    _, labels = packed.batch(np.arange(len(packed)))
    flat = labels.flatten()
    return [int(label) for label in flat[flat != IGNORED]]


def test_of_a_prompt_and_its_response_only_the_response_and_its_end_count(tmp_path: Path) -> None:
    rows = [{"q": "why? ", "a": "so"}, {"q": "and? ", "a": "no"}] * 10
    corpus = jsonl(tmp_path / "pairs.jsonl", rows)
    config = DataConfig(corpus=corpus, prompt="q", response="a", validation_every=20)
    both = read_corpus(config, BYTES)
    assert bytes(both.train.tokens[:8].astype(np.uint8)) == b"why? so\x00"
    assert learned(both.train) == [*b"so", 256, *b"no", 256] * 9 + [*b"so", 256]
    assert learned(both.validation) == [*b"no", 256]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["beginnings", "marks"])
def test_of_a_conversation_only_what_the_assistant_says_counts(
    template: str, templated: Callable[[str], FolderTokenizer], tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "the quick"},
        {"role": "assistant", "content": "brown fox"},
        {"role": "user", "content": "jumps"},
        {"role": "assistant", "content": "over"},
    ]
    corpus = jsonl(tmp_path / "chats.jsonl", [{"chat": turns}] * 4)
    tokenizer = templated(template)
    config = DataConfig(corpus=corpus, messages="chat", validation_every=2, sequence_length=5)
    both = read_corpus(config, tokenizer)
    said = [*tokenizer.encode("brown fox <end>"), *tokenizer.encode("over <end>")]
    assert learned(both.train) == said * 2
    assert learned(both.validation) == said * 2
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"q": "the quick", "a": "brown fox"}] * 2)
    config = DataConfig(corpus=pairs, prompt="q", response="a", validation_every=2)
    assert learned(read_corpus(config, tokenizer).train) == said[:3]


def test_conversations_that_nobody_can_tell_apart_are_refused(
    templated: Callable[[str], FolderTokenizer], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the"}]
    corpus = jsonl(tmp_path / "chats.jsonl", [{"chat": [*turns, *turns]}] * 4)
    config = DataConfig(corpus=corpus, messages="chat", validation_every=2)
    with pytest.raises(ValueError, match=r"its text of a turn changes.*generation"):
        read_corpus(config, templated(FORGETFUL))
    with pytest.raises(ValueError, match="conversations need a tokenizer with a chat template"):
        read_corpus(config, BYTES)
    for rows, words in (([{"chat": "hello"}], "lists of"), ([{"chat": [{"role": "x"}]}], "lists")):
        bad = DataConfig(corpus=jsonl(tmp_path / "bad.jsonl", rows), messages="chat")
        with pytest.raises(ValueError, match=words):
            read_corpus(bad, BYTES)
    asked = jsonl(tmp_path / "asked.jsonl", [{"chat": turns[:1]}] * 2)
    with pytest.raises(ValueError, match="some of the training tokens must count"):
        read_corpus(
            DataConfig(corpus=asked, messages="chat", validation_every=2), templated(TEMPLATE)
        )


def test_a_run_on_answers_alone_is_resumed_only_on_the_same_answers(
    tiny: Tiny, tmp_path: Path
) -> None:
    rows = [{"q": "the quick brown ", "a": "fox jumps"}, {"q": "a lazy ", "a": "dog"}] * 200
    corpus = jsonl(tmp_path / "pairs.jsonl", rows)
    columns = (f"data.corpus={corpus}", "data.prompt=q", "data.response=a")
    saving = ("train.steps=3", "checkpoint.every=3")
    assert run(tiny(*columns, *saving)) == 0
    assert metrics(tmp_path / "tiny")[0]["tokens"] < 8 * 32 * 0.6  # (7 + 6) of 39 bytes or so
    again = ("train.steps=6", "checkpoint={every: 3, resume: auto}")
    other = ("data.prompt=null", "data.response=null", "data.field=q")
    with pytest.raises(ValueError, match="corpus was"):
        run(tiny(*columns, *other, *again))
    assert run(tiny(*columns, *again)) == 0


def test_a_validation_file_of_its_own_leaves_the_corpus_whole(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "corpus.jsonl", [{"text": "abc"}] * 40)
    own = jsonl(tmp_path / "own.jsonl", [{"text": "xyz"}, {"text": "uvw"}])
    both = read_corpus(DataConfig(corpus=corpus, validation=own), BYTES)
    assert both.train.tokens.tolist() == [*b"abc", 256] * 40
    assert both.validation.tokens.tolist() == [*b"xyz", 256, *b"uvw", 256]


def test_a_run_on_a_file_of_tokens_is_the_run_on_its_text(
    tiny: Tiny, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.npy"
    assert main(["tokenize", str(corpus), str(file)]) == 0
    assert "tokens" in capsys.readouterr().out
    from_text = read_corpus(DataConfig(corpus=str(corpus), validation=str(corpus)), BYTES)
    from_file = read_corpus(DataConfig(corpus=str(file), validation=str(file)), BYTES)
    assert isinstance(from_file.train.tokens, np.memmap)
    assert from_file.train.tokens.dtype == np.uint16
    assert from_file.train.tokens.tolist() == from_text.train.tokens.tolist()
    one, other = (each.train.batch(np.array([0, 5, -1])) for each in (from_text, from_file))
    assert all(bool((a == b).all()) for a, b in zip(one, other, strict=True))
    held_out = read_corpus(DataConfig(corpus=str(file), validation_every=10), BYTES)
    assert len(held_out.validation.tokens) == len(from_file.train.tokens) // 10
    assert run(tiny(f"data.corpus={file}", "train.steps=1")) == 0


def test_a_file_of_tokens_that_is_none_is_refused_by_its_name(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, large = tmp_path / "junk.npy", tmp_path / "large.npy"
    file.write_bytes(b"junk")
    np.save(large, np.array([1, 2, 300]))
    np.save(tmp_path / "table.npy", np.zeros((2, 2)))
    for name, words in (
        ("junk.npy", "must be what flora-dist tokenize wrote; '{}'"),
        ("large.npy", "which has 257; '{}' has 300"),
        ("table.npy", "one row of whole numbers; '{}'"),
    ):
        path = tmp_path / name
        with pytest.raises(ValueError, match=words.format(path)):
            read_corpus(DataConfig(corpus=str(path)), BYTES)
    for target, words in ((file, "exists"), (tmp_path / "tokens.bin", "ends in .npy")):
        assert main(["tokenize", str(corpus), str(target)]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*partial*"))


def test_a_table_that_is_not_read_by_columns_is_refused_unless_it_is_called_text(
    tmp_path: Path,
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,label\nabc,1\n" * 40)
    with pytest.raises(ValueError, match=r"'.*table\.csv' is a table of another kind"):
        read_corpus(DataConfig(corpus=str(path)), BYTES)
    assert len(read_corpus(DataConfig(corpus=str(path), format="text"), BYTES).train)


def test_a_broken_file_of_several_is_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that reads them said it first, in a line of its own."""
    log = logging.getLogger("datasets")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [{"text": "whole"}])
    (folder / "b.jsonl").write_text('{"text": "whole"}\n{"text": \n')
    (tmp_path / "junk.parquet").write_bytes(b"junk" * 100)
    for place, words in (
        (folder, f"'{folder / 'b.jsonl'}' is broken: line 2: "),
        (tmp_path / "junk.parquet", f"'{tmp_path / 'junk.parquet'}' is broken: "),
    ):
        with pytest.raises(ValueError, match="file must be whole") as caught:
            read_corpus(DataConfig(corpus=str(place)), BYTES)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert ".." not in str(caught.value)
    assert caplog.records == []
    assert log.level <= logging.WARNING
