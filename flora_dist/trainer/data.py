# SPDX-License-Identifier: Apache-2.0
"""Documents to packed sequences, and which sequences make the batch of a step.

Everything here is a function of the config alone, never of the number of processes.
"""

from __future__ import annotations

import sysconfig
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flora_dist.trainer.config import STDLIB, DataConfig
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.tokenizer import Tokenizer
from flora_dist.trainer.utf8 import first_not_utf8

with needs_train_extra():
    import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED = -100  # cross_entropy's own default for a label that does not count
_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_ENDINGS = {".json": "jsonl", ".jsonl": "jsonl", ".parquet": "parquet"}
_LOADERS = {"text": "text", "jsonl": "json", "parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A stream of tokens cut into sequences; the last one is filled up and its rest ignored."""

    tokens: NDArray[np.int32]
    """Documents one after the other, each followed by the end token."""
    length: int
    """Tokens per sequence."""

    def __len__(self) -> int:
        """Number of sequences; the last may be partly filled."""
        return max(0, -(-(len(self.tokens) - 1) // self.length))

    def batch(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, both (sequences, length), int64; label t is the token after input t.

        An index of -1 gives a sequence whose every label is ignored: a process without a sequence
        of its own still has to take part in the collectives of the forward pass.
        """
        positions = indices[:, None] * self.length + np.arange(self.length)
        inside = (indices[:, None] >= 0) & (positions + 1 < len(self.tokens))
        inputs = np.where(inside, self.tokens[np.where(inside, positions, 0)], 0)
        labels = np.where(inside, self.tokens[np.where(inside, positions + 1, 0)], IGNORED)
        return torch.from_numpy(inputs).long(), torch.from_numpy(labels).long()


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation tokens of one corpus under one tokenizer."""

    train: Packed
    """Trained on, in shuffled order."""
    validation: Packed
    """Held out."""

    @property
    def fingerprint(self) -> str:
        """CRC-32 of the training tokens: a resumed run must see the same ones."""
        return f"{zlib.crc32(self.train.tokens.tobytes()):08x}"


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which sequences make the global batch of a step: shuffled epochs, one after the other."""

    sequences: int
    """Number of training sequences."""
    global_batch: int
    """Sequences per step."""
    seed: int
    """The run's seed."""

    def __post_init__(self) -> None:
        if self.global_batch > self.sequences:
            raise ValueError(
                f"a batch must fit into the corpus; train.global_batch={self.global_batch}, the "
                f"corpus has {self.sequences} training sequences. Lower the batch or "
                "data.sequence_length, or give more text."
            )

    def global_indices(self, step: int) -> NDArray[np.int64]:
        """The global batch of a step, counted from 0."""
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        epochs, places = np.divmod(positions, self.sequences)
        return np.stack(
            [
                _shuffled(self.sequences, self.seed, int(epoch))[place]
                for epoch, place in zip(epochs, places, strict=True)
            ]
        )

    def micro_batches(
        self, step: int, *, micro_batch: int, process_rank: int, world_size: int
    ) -> list[NDArray[np.int64]]:
        """This process's part of the global batch, in accumulation order."""
        rounds = self.global_indices(step).reshape(-1, world_size, micro_batch)
        return list(rounds[:, process_rank])


@lru_cache(maxsize=2)  # a batch touches two epochs at most
def _shuffled(sequences: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Sorting raw Philox bits: numpy guarantees the bits for ever, but not Generator.permutation.
    bits = np.random.Philox(key=seed + (epoch << 64)).random_raw(sequences)
    return np.argsort(bits, kind="stable")


def evenly_spread(sequences: int, wanted: int) -> NDArray[np.int64]:
    """At most `wanted` of the sequences, evenly spaced: the fixed validation slice.

    >>> evenly_spread(10, 4).tolist(), evenly_spread(2, 4).tolist()
    ([0, 2, 5, 7], [0, 1])
    """
    count = min(sequences, wanted)
    return np.arange(count) * sequences // count


def read_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Read, tokenize, split and pack the corpus; nothing is written to disk.

    Every `validation_every`-th document is held out. A corpus of fewer documents holds out the last
    `1 / validation_every` of its tokens instead.

    Raises:
        ValueError: no readable document, text that is not UTF-8, an unknown column, or nothing left
            for validation.
    """
    documents = [np.append(tokenizer.encode(text), tokenizer.end) for text in _documents(config)]
    every = config.validation_every
    if not documents:
        raise ValueError(
            f"data.corpus must hold at least one document; {config.corpus!r} holds none. "
            "Check the path and data.format."
        )
    if len(documents) >= every:
        train = [d for i, d in enumerate(documents) if i % every != every - 1]
        validation = documents[every - 1 :: every]
    else:
        stream = np.concatenate(documents)
        cut = len(stream) - len(stream) // every
        train, validation = [stream[:cut]], [stream[cut:]]
    corpus = Corpus(train=_pack(train, config), validation=_pack(validation, config))
    if not len(corpus.validation):
        raise ValueError(
            f"validation needs at least two tokens; {config.corpus!r} leaves "
            f"{len(corpus.validation.tokens)}. Give more text or lower data.validation_every."
        )
    return corpus


def _pack(documents: list[NDArray[np.int32]], config: DataConfig) -> Packed:
    return Packed(tokens=np.concatenate(documents).astype(np.int32), length=config.sequence_length)


def _documents(config: DataConfig) -> Iterator[str]:
    if config.corpus == STDLIB:
        yield from _standard_library()
        return
    files, kind = _files(config)
    with needs_train_extra():
        import datasets
    # Streaming with a cache folder of its own leaves nothing behind, also when a check fails later.
    with tempfile.TemporaryDirectory() as cache, _naming_bad_bytes(config, files, kind):
        options = {"sample_by": "document"} if kind == "text" else {}
        column = "text" if kind == "text" else config.field
        rows = datasets.load_dataset(
            _LOADERS[kind],
            data_files=[str(file) for file in files],
            split="train",
            streaming=True,
            cache_dir=cache,
            **options,
        )
        for row in rows:
            if not isinstance(row.get(column), str):
                raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all config errors
                    f"data.field must name a column of text; {column!r} is "
                    f"{row.get(column)!r} in {config.corpus!r}, whose columns are "
                    f"{', '.join(row)}. Correct data.field."
                )
            yield row[column]


@contextmanager
def _naming_bad_bytes(config: DataConfig, files: Sequence[Path], kind: str) -> Iterator[None]:
    """The loaders name neither the file nor its byte where text is not UTF-8.

    Raises:
        ValueError: naming both; of parquet, whose bytes are no text, the column.
    """
    try:
        yield
    except Exception as error:
        bad = first_not_utf8(files) if kind != "parquet" else None
        if bad is None and isinstance(error, UnicodeDecodeError):
            bad = (
                f"text must be UTF-8; the column {config.field!r} of {config.corpus!r} is not: "
                f"{error}. Convert that column to UTF-8."
            )
        if bad is None:
            raise
        raise ValueError(bad) from error


def _files(config: DataConfig) -> tuple[list[Path], str]:
    """The files of the corpus in sorted order, and the one format they share."""
    path = Path(config.corpus)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if config.format != "auto":
        return files, config.format
    kinds = sorted({_ENDINGS.get(file.suffix.lower(), "text") for file in files})
    if len(kinds) != 1:
        raise ValueError(
            f"a corpus must have one format; {config.corpus!r} has "
            f"{', '.join(kinds) or 'no files'}. "
            "Set data.format, or point data.corpus at the files of one format."
        )
    return files, kinds[0]


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")
