# SPDX-License-Identifier: Apache-2.0
"""Corpora that are tokenized once, by one process, and mapped into memory by all.

`data.cache` names a folder with an entry for each corpus: its name is the sha256 of everything that
its tokens follow from, files of text and tokenizer, settings and versions. An entry is complete or
not there; one whose files are not what was written is refused.

    <cache>/<sha256>/manifest.json          sha256 of each array
    <cache>/<sha256>/train.npy ...          tokens, and which of them count
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from flora_dist.trainer.config_data import BYTE, STDLIB, DataConfig
from flora_dist.trainer.data import Corpus, Packed, is_of_tokens, read_corpus
from flora_dist.trainer.documents import files_of, standard_library
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.tokenizer import Tokenizer

with needs_train_extra():
    import numpy as np

_FORMAT = 1
_CHUNK = 1 << 22
_MANIFEST = "manifest.json"
_PARTS = ("train", "validation")
_TOKENIZING = ("tokenizers", "transformers", "sentencepiece")
_UNHEARD = ("cache", "sequence_length", "corpus", "validation", "tokenizer")
"""Settings that change no token, or are known by their files."""


def open_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """The corpus of `read_corpus`, from `data.cache` if that is set; tokens are the same.

    A file of tokens is mapped where it is.

    Raises:
        ValueError: as `read_corpus`, or the cache cannot be written, or an entry is damaged.
    """
    if config.cache is None or is_of_tokens(config, config.corpus):
        return read_corpus(config, tokenizer)
    folder = Path(config.cache)
    entry = folder / _key(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not entry.exists():
            with _locked(folder / f".{entry.name}.lock"):
                if not entry.exists():  # nor written by who had the lock before
                    _write(read_corpus(config, tokenizer), entry)
    except OSError as error:
        raise ValueError(
            f"data.cache must be a folder that can be written; '{folder}' gave: {error}. Correct "
            "it, or set it to null."
        ) from error
    return _open(entry, config.sequence_length)


def _key(config: DataConfig) -> str:
    """The sha256 of what tokens follow from."""
    settings = {k: v for k, v in asdict(config).items() if k not in _UNHEARD}
    corpora = [config.corpus, *([config.validation] if config.validation else [])]
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "settings": settings,
        "versions": [f"{name} {_version(name)}" for name in _TOKENIZING],
        "python": platform.python_version(),
        "text": [[_digest(file) for file in _files(corpus, config.format)] for corpus in corpora],
        "tokenizer": BYTE,
    }
    if config.tokenizer != BYTE:
        root = Path(config.tokenizer)
        inside = sorted(path for path in root.rglob("*") if path.is_file())
        facts["tokenizer"] = [[str(p.relative_to(root)), _digest(p)] for p in inside]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _files(corpus: str, form: str) -> Iterable[Path]:
    return standard_library() if corpus == STDLIB else files_of(corpus, form)[0]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time, where the file system knows locks; a kill gives it back."""
    with file.open("w") as stream:
        # Without a lock several processes tokenize, and the first that is done has written.
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write(corpus: Corpus, entry: Path) -> None:
    """Write an entry beside its place, and move it there whole."""
    partial = entry.with_name(f".{entry.name}.{uuid4().hex}.partial")
    partial.mkdir()
    try:
        digests = {}
        for name, packed in zip(_PARTS, (corpus.train, corpus.validation), strict=True):
            arrays = {name: packed.tokens, f"{name}-counted": packed.counted}
            for file, array in arrays.items():
                if array is not None:
                    np.save(partial / f"{file}.npy", array, allow_pickle=False)
                    digests[f"{file}.npy"] = _digest(partial / f"{file}.npy")
        (partial / _MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
        try:
            partial.rename(entry)
        except OSError:
            if not entry.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(entry: Path, length: int) -> Corpus:
    """Map an entry whose files are what was written.

    Raises:
        ValueError: they are not.
    """
    try:
        digests = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name, known in digests.items() if _digest(entry / name) != known]
        if wrong:
            raise ValueError(f"{wrong[0]} has another sha256")
        arrays = {
            name: np.load(entry / name, mmap_mode="r", allow_pickle=False) for name in digests
        }
        train, validation = (
            Packed(
                tokens=arrays[f"{part}.npy"],
                length=length,
                counted=arrays.get(f"{part}-counted.npy"),
            )
            for part in _PARTS
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"a corpus in data.cache must be what was written there; '{entry}' is not: {error}. "
            "Remove that folder: the next run writes it anew."
        ) from error
    return Corpus(train=train, validation=validation)
