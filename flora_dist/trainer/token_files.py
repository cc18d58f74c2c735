# SPDX-License-Identifier: Apache-2.0
"""Token numbers on disk: written once, then read as they are needed, by all processes alike."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flora_dist.trainer.config_data import BYTE, STDLIB, DataConfig
from flora_dist.trainer.documents import Document, documents_of
from flora_dist.trainer.hub import text, tokenizer_of
from flora_dist.trainer.optional_imports import needs_train_extra, stay_offline
from flora_dist.trainer.tokenizer import open_tokenizer

with needs_train_extra():
    import numpy as np
    from numpy.lib import format as npy

_CHUNK = 1 << 22


def tokenize(corpus: str, target: Path, *, tokenizer: str, field: str) -> int:
    """Write a corpus as a file of tokens; their number.

    Args:
        corpus: as `data.corpus`.
        target: a .npy file that is not there.
        tokenizer: as `data.tokenizer`.
        field: as `data.field`.

    Raises:
        ValueError: a corpus or tokenizer that cannot be read, or a target that is taken.
    """
    corpus, tokenizer = text("CORPUS", corpus), tokenizer_of("--tokenizer", tokenizer)
    stay_offline()
    for name, path, built_in in (("CORPUS", corpus, STDLIB), ("--tokenizer", tokenizer, BYTE)):
        if path != built_in and not Path(path).exists():
            raise ValueError(f"{name} must exist; {path!r} does not. Correct the path.")
    opened = open_tokenizer(tokenizer)
    config = DataConfig(corpus=corpus, tokenizer=tokenizer, field=field)
    documents = documents_of(config, corpus, opened)
    return write_tokens(documents, target, vocabulary=opened.vocabulary)


def write_tokens(documents: Iterable[Document], path: Path, *, vocabulary: int) -> int:
    """Write documents one behind the other as a .npy file; the number of tokens.

    One document is in memory at a time. The file is complete or not there.

    Raises:
        ValueError: the path has another ending, is taken or lies in no folder, a document has
            tokens that do not count, or there is none.
    """
    if path.suffix != ".npy":
        raise ValueError(f"a file of tokens ends in .npy; it is '{path}'. Name it so.")
    if path.exists():
        raise ValueError(f"a file of tokens overwrites nothing; '{path}' exists. Name another.")
    if not path.parent.is_dir():
        raise ValueError(
            f"a file of tokens is written into a folder; '{path.parent}' is none. Make it."
        )
    kind = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    partial, count = path.with_name(f".{path.name}.partial"), 0
    try:
        with partial.open("wb") as file:
            _header(file, kind, count)
            for document in documents:
                if document.counted is not None:
                    raise ValueError(
                        "a file of tokens holds no marks of what counts; the corpus has prompts or "
                        "conversations. Train on it directly."
                    )
                file.write(document.tokens.astype(kind).tobytes())
                count += len(document.tokens)
            file.seek(0)
            _header(file, kind, count)
        if not count:
            raise ValueError("a file of tokens needs at least one document; there is none.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _header(file: Any, kind: Any, count: int) -> None:
    # numpy leaves room for the length of the first axis to grow: both headers are equally long.
    described = {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
    npy.write_array_header_1_0(file, described)


def open_tokens(path: Path, *, vocabulary: int) -> Any:
    """The token numbers of a file, mapped into memory.

    Raises:
        ValueError: no such file, or numbers that the tokenizer does not have.
    """
    try:
        tokens = npy.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"a file of tokens must be what flora-dist tokenize wrote; '{path}' gave: {error}. "
            "Write it anew."
        ) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"a file of tokens holds one row of whole numbers; '{path}' has {tokens.dtype} of "
            f"shape {tokens.shape}. Write it with flora-dist tokenize."
        )
    for begin in range(0, len(tokens), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        if int(chunk.max()) >= vocabulary or int(chunk.min()) < 0:
            raise ValueError(
                f"tokens must be numbers of data.tokenizer, which has {vocabulary}; '{path}' has "
                f"{int(chunk.max())}. Name the tokenizer that the file was written with."
            )
    return tokens
