# SPDX-License-Identifier: Apache-2.0
"""Corpora, tokenizers, packing, and batches that do not depend on the number of processes."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from flora_dist.trainer.config_data import STDLIB, DataConfig
from flora_dist.trainer.data import IGNORED, Order, Packed, read_corpus
from flora_dist.trainer.tokenizer import ByteTokenizer, open_tokenizer

BYTES = ByteTokenizer()


def as_text(packed: Packed) -> list[str]:
    """The documents of a stream of bytes."""
    parts = np.split(packed.tokens, np.flatnonzero(packed.tokens == BYTES.end) + 1)
    return [bytes(part[:-1].astype(np.uint8)).decode() for part in parts if len(part)]


@pytest.fixture
def documents() -> list[str]:
    return [f"document {number}\nwith ümlauts" for number in range(50)]


def write(folder: Path, kind: str, documents: list[str]) -> Path:
    path = folder / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"body": d}) + "\n" for d in documents))
    elif kind == "parquet":
        import datasets

        datasets.Dataset.from_dict({"body": documents}).to_parquet(str(path))
    else:
        path = folder / "texts"
        path.mkdir()
        for number, document in enumerate(documents):
            (path / f"{number:03d}.txt").write_text(document, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_every_format_gives_the_same_documents_in_order(
    kind: str, tmp_path: Path, documents: list[str]
) -> None:
    path = write(tmp_path, kind, documents)
    corpus = read_corpus(DataConfig(corpus=str(path), field="body", validation_every=10), BYTES)
    assert as_text(corpus.train) == [d for i, d in enumerate(documents) if i % 10 != 9]
    assert as_text(corpus.validation) == documents[9::10]


def test_reading_a_corpus_leaves_no_file_behind(
    tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, "jsonl", documents)
    read_corpus(DataConfig(corpus=str(path), field="body"), BYTES)
    assert [p.name for p in tmp_path.rglob("*")] == [path.name]


def test_the_standard_library_is_read_in_sorted_order_without_its_tests() -> None:
    corpus = read_corpus(DataConfig(corpus=STDLIB), BYTES)
    # CPython's sources without tests are about 12 MB; a distribution may leave some out.
    assert len(corpus.train.tokens) > 3_000_000
    text = bytes(corpus.train.tokens[corpus.train.tokens != BYTES.end].astype(np.uint8))
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    assert text.startswith(files[0].read_bytes() + files[1].read_bytes())
    assert b"class OrderedDict(dict)" in text
    assert b"class TestOrderedDict" not in text


def test_a_corpus_of_one_document_holds_out_its_end(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("x" * 999)
    corpus = read_corpus(DataConfig(corpus=str(path), validation_every=10), BYTES)
    assert len(corpus.train.tokens) == 900
    assert len(corpus.validation.tokens) == 100


def test_packed_labels_are_the_next_tokens_and_the_last_sequence_is_filled_up() -> None:
    packed = Packed(tokens=np.arange(8, dtype=np.int32), length=3)
    assert len(packed) == 3
    inputs, labels = packed.batch(np.array([0, 2, -1]))
    assert inputs.tolist() == [[0, 1, 2], [6, 0, 0], [0, 0, 0]]
    assert labels.tolist() == [[1, 2, 3], [7, IGNORED, IGNORED], [IGNORED] * 3]
    counted = sum(int((packed.batch(np.array([i]))[1] != IGNORED).sum()) for i in range(3))
    assert counted == 7  # each token but the first is predicted once


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_global_batch_of_a_step_is_the_same_on_any_world_size(world_size: int) -> None:
    order = Order(sequences=100, global_batch=24, seed=3)
    for step in (0, 3, 4, 9):  # step 4 crosses from the first epoch into the second
        parts = [
            order.micro_batches(step, micro_batch=2, process_rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        together = np.concatenate([np.concatenate(part) for part in parts])
        assert sorted(together) == sorted(order.global_indices(step))


def test_an_epoch_holds_every_sequence_once_and_the_next_another_order() -> None:
    order = Order(sequences=24, global_batch=8, seed=0)
    epochs = [np.concatenate([order.global_indices(3 * e + s) for s in range(3)]) for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0].tolist() != epochs[1].tolist()
    other_seed = Order(sequences=24, global_batch=24, seed=1)
    assert epochs[0].tolist() != other_seed.global_indices(0).tolist()


def test_the_order_of_a_seed_never_changes() -> None:
    # Philox's bits are fixed for ever; an old checkpoint depends on it.
    order = Order(sequences=10, global_batch=10, seed=7)
    assert order.global_indices(0).tolist() == [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]


def test_a_batch_larger_than_the_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch=8, the corpus has 7 training sequences"):
        Order(sequences=7, global_batch=8, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', "data.field must name a column of text; 'text'"),
        ("a.jsonl", '{"text": 5}\n', "data.field must name a column of text; 'text' is 5"),
        ("a.txt", "", "validation needs at least two tokens"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(DataConfig(corpus=str(tmp_path / name)), BYTES)


def test_text_that_is_not_utf8_is_named_with_its_file_and_byte(tmp_path: Path) -> None:
    # "'utf-8' codec can't decode byte 0xe9 in position 0" was all that one heard of 1,000 files.
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("fine, ümlauts included")
    # Far behind the first piece that is read, and behind a sign that two pieces share.
    bad = b"x" * ((1 << 20) - 1) + "ü".encode() + b"y" * 5 + b"\xe9 caf\xe9"
    (folder / "b.txt").write_bytes(bad)
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    cut = tmp_path / "cut.txt"
    cut.write_bytes("ends in the middle of ü".encode()[:-1])
    for path, file, offset in (
        (folder, folder / "b.txt", (1 << 20) + 6),
        (lines, lines, 30),
        (cut, cut, 22),
    ):
        with pytest.raises(ValueError, match=r"text must be UTF-8; .*Convert the file") as caught:
            read_corpus(DataConfig(corpus=str(path)), BYTES)
        assert f"'{file}' has the byte 0x" in str(caught.value)
        assert f"at offset {offset}, which" in str(caught.value)


def test_a_parquet_column_that_is_not_utf8_is_named_by_its_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "bad.parquet"
    column = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(ValueError, match=r"the column 'text' of '.*bad.parquet' is not"):
        read_corpus(DataConfig(corpus=str(path)), BYTES)


def test_a_folder_of_two_formats_is_refused_and_an_empty_one_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one format; .* has no files"):
        read_corpus(DataConfig(corpus=str(tmp_path)), BYTES)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="has jsonl, text"):
        read_corpus(DataConfig(corpus=str(tmp_path)), BYTES)


def test_bytes_that_utf8_cannot_hold_still_become_tokens() -> None:
    assert BYTES.encode("a\ud800é").tolist() == [97, ord("?"), 0xC3, 0xA9]


def test_a_local_tokenizer_folder_gives_its_tokens_and_its_end(word_tokenizer: Path) -> None:
    tokenizer = open_tokenizer(str(word_tokenizer))
    assert tokenizer.vocabulary == 20
    assert tokenizer.end == 1
    assert len(tokenizer.encode("quick brown fox")) == 3


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer must be 'byte' or a folder"):
        open_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_token_is_named(word_tokenizer: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    file = str(word_tokenizer / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have an end-of-text token"):
        open_tokenizer(str(tmp_path))
