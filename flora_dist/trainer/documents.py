# SPDX-License-Identifier: Apache-2.0
"""Files to documents: text, jsonl and parquet, as token numbers and which of them count."""

from __future__ import annotations

import json
import logging
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_dist.trainer.config_data import STDLIB, DataConfig
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.tokenizer import Tokenizer
from flora_dist.trainer.utf8 import first_not_utf8

with needs_train_extra():
    import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_ENDINGS = {".json": "jsonl", ".jsonl": "jsonl", ".parquet": "parquet", ".npy": "tokens"}
_TABLES = frozenset({".csv", ".tsv"})
_LOADERS = {"text": "text", "jsonl": "json", "parquet": "parquet"}
_ROLES = frozenset({"system", "user", "assistant", "tool"})


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document, closed by its end token or its template's."""

    tokens: NDArray[np.int32]
    """Token numbers."""
    counted: NDArray[np.bool_] | None = None
    """Which of them are learned; None: all."""


def files_of(corpus: str, form: str) -> tuple[list[Path], str]:
    """The files of a corpus in sorted order, and the one format they share.

    Raises:
        ValueError: they have several formats, or one that is not read, or there are none.
    """
    path = Path(corpus)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if form != "auto":
        return files, form
    table = next((file for file in files if file.suffix.lower() in _TABLES), None)
    if table is not None:
        raise ValueError(
            f"a corpus is text, jsonl, parquet or tokens; '{table}' is a table of another kind. "
            "Write it as jsonl or parquet, or set data.format: text to train on it as it stands."
        )
    kinds = sorted({_ENDINGS.get(file.suffix.lower(), "text") for file in files})
    if len(kinds) != 1:
        raise ValueError(
            f"a corpus must have one format; {corpus!r} has {', '.join(kinds) or 'no files'}. "
            "Set data.format, or point data.corpus at the files of one format."
        )
    return files, kinds[0]


def documents_of(config: DataConfig, corpus: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents of one corpus, read and tokenized one by one.

    Raises:
        ValueError: text that is not UTF-8, a broken file, an unknown column, a row that is no
            conversation, or a tokenizer that cannot tell its turns.
    """
    if corpus == STDLIB:
        for path in standard_library():
            yield _whole(path.read_text(encoding="utf-8", errors="replace"), tokenizer)
        return
    for row in _rows(config, corpus):
        if config.messages is not None:
            yield _conversation(_messages(row, config.messages, corpus), tokenizer)
        elif config.prompt is not None and config.response is not None:
            prompt = _text(row, "data.prompt", config.prompt, corpus)
            response = _text(row, "data.response", config.response, corpus)
            yield _answered(prompt, response, tokenizer)
        else:
            yield _whole(_text(row, "data.field", config.field, corpus), tokenizer)


def _whole(text: str, tokenizer: Tokenizer) -> Document:
    return Document(tokens=np.append(tokenizer.encode(text), np.int32(tokenizer.end)))


def _answered(prompt: str, response: str, tokenizer: Tokenizer) -> Document:
    """By the tokenizer's template; where it has none, one behind the other."""
    if tokenizer.has_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return _conversation(turns, tokenizer)
    asked, answer = tokenizer.encode(prompt), _whole(response, tokenizer).tokens
    counted = np.repeat([False, True], [len(asked), len(answer)])
    return Document(tokens=np.concatenate([asked, answer]), counted=counted)


def _conversation(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> Document:
    tokens, counted = tokenizer.chat(messages)
    return Document(tokens=tokens, counted=counted)


def _messages(row: Mapping[str, Any], column: str, corpus: str) -> list[Mapping[str, str]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        raise ValueError(
            "data.messages must name a column of conversations, lists of {role, content} with "
            f"roles {', '.join(sorted(_ROLES))}; {column!r} is {turns!r} in {corpus!r}, whose "
            f"columns are {', '.join(row)}. Correct data.messages or that row."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _is_turn(turn: object) -> bool:
    return (
        isinstance(turn, Mapping)
        and turn.get("role") in _ROLES
        and isinstance(turn.get("content"), str)
    )


def _text(row: Mapping[str, Any], key: str, column: str, corpus: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all config errors
            f"{key} must name a column of text; {column!r} is {value!r} in {corpus!r}, whose "
            f"columns are {', '.join(row)}. Correct {key}."
        )
    return value


def _rows(config: DataConfig, corpus: str) -> Iterator[dict[str, Any]]:
    files, kind = files_of(corpus, config.format)
    if kind == "text" and (config.messages or config.prompt):
        raise ValueError(
            f"prompts and conversations are columns of jsonl or parquet; {corpus!r} is text. "
            "Remove data.messages and data.prompt, or set data.format."
        )
    column = "text" if kind == "text" else None  # its loader's own name for the document
    with needs_train_extra():
        import datasets
    # Streaming with a cache folder of its own leaves nothing behind, also when a check fails later.
    with tempfile.TemporaryDirectory() as cache, _naming_the_file(config, corpus, files, kind):
        options = {"sample_by": "document"} if kind == "text" else {}
        rows = datasets.load_dataset(
            _LOADERS[kind],
            data_files=[str(file) for file in files],
            split="train",
            streaming=True,
            cache_dir=cache,
            **options,
        )
        for row in rows:
            yield {config.field: row[column]} if column else row


@contextmanager
def _naming_the_file(
    config: DataConfig, corpus: str, files: Sequence[Path], kind: str
) -> Iterator[None]:
    """The loaders name neither the file that is broken nor the place in it.

    Raises:
        ValueError: naming both; of parquet, whose bytes are no text, the column.
    """
    log = logging.getLogger("datasets")
    level = log.level
    # It would tell the same mistake first, in words of its own; the exception has all that it says.
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        bad = first_not_utf8(files) if kind != "parquet" else None
        if bad is None and isinstance(error, UnicodeDecodeError):
            bad = (
                f"text must be UTF-8; the column {config.field!r} of {corpus!r} is not: "
                f"{error}. Convert that column to UTF-8."
            )
        bad = bad or _first_broken(files, kind)
        if bad is None:
            raise
        raise ValueError(bad) from error
    finally:
        log.setLevel(level)


def _first_broken(files: Sequence[Path], kind: str) -> str | None:
    """What to say of the first file that is not of its format; None: all are."""
    check = {"jsonl": _fault_of_lines, "parquet": _fault_of_parquet}.get(kind)
    for file in files:
        fault = check(file) if check is not None else None
        if fault is not None:
            return (
                f"a {kind} file must be whole; '{file}' is broken: "
                f"{' '.join(fault.split()).rstrip('.')}. Write it anew, or leave it out."
            )
    return None


def _fault_of_lines(file: Path) -> str | None:
    seen = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                seen += 1
                if line.strip():
                    json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"line {seen}: {error}"
    return None


def _fault_of_parquet(file: Path) -> str | None:
    from pyarrow import parquet

    try:
        parquet.read_metadata(file)
    except ValueError as error:  # pyarrow's own
        return str(error)
    return None


def standard_library() -> Iterator[Path]:
    """The files of `python-stdlib`, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts):
            yield path
