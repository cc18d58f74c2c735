# SPDX-License-Identifier: Apache-2.0
"""Documents to packed sequences, and which sequences make the batch of a step.

Everything here is a function of the config alone, never of the number of processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from flora_dist.trainer.config_data import STDLIB, DataConfig
from flora_dist.trainer.documents import Document, documents_of, files_of
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.token_files import open_tokens
from flora_dist.trainer.tokenizer import Tokenizer

with needs_train_extra():
    import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED = -100  # cross_entropy's own default for a label that does not count
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A stream of tokens cut into sequences; the last one is filled up and its rest ignored."""

    tokens: NDArray[Any]
    """Documents one after the other, each followed by the end token; whole numbers."""
    length: int
    """Tokens per sequence."""
    counted: NDArray[np.bool_] | None = None
    """Which tokens are learned; None: all."""

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
        here, after = np.where(inside, positions, 0), np.where(inside, positions + 1, 0)
        inputs = np.where(inside, self.tokens[here].astype(np.int64), 0)
        learned = inside if self.counted is None else inside & self.counted[after]
        labels = np.where(learned, self.tokens[after].astype(np.int64), IGNORED)
        return torch.from_numpy(inputs), torch.from_numpy(labels)


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
        tokens, counted = self.train.tokens, self.train.counted
        value = 0
        for begin in range(0, len(tokens), _CHUNK):  # they may be a file larger than memory
            value = zlib.crc32(tokens[begin : begin + _CHUNK].tobytes(), value)
        if counted is not None:
            value = zlib.crc32(np.packbits(counted).tobytes(), value)
        return f"{value:08x}"


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

    Without `validation`, every `validation_every`-th document is held out; of a corpus of fewer
    documents, or of a file of tokens, the last `1 / validation_every` of the tokens.

    Raises:
        ValueError: no readable document, a broken file, an unknown column, or nothing left for
            validation.
    """
    train, held_out = _train_and_held_out(config, tokenizer)
    if config.validation is not None:
        held_out = _read(config, config.validation, tokenizer)
    corpus = Corpus(train=train, validation=held_out)
    if not len(corpus.validation):
        raise ValueError(
            f"validation needs at least two tokens; {config.validation or config.corpus!r} leaves "
            f"{len(held_out.tokens)}. Give more text or lower data.validation_every."
        )
    for name, packed in (("training", train), ("validation", held_out)):
        if packed.counted is not None and not packed.counted[1:].any():
            raise ValueError(
                f"some of the {name} tokens must count; {config.corpus!r} has no answer there. "
                "Give responses or assistant's turns."
            )
    return corpus


def _train_and_held_out(config: DataConfig, tokenizer: Tokenizer) -> tuple[Packed, Packed]:
    if is_of_tokens(config, config.corpus) or config.validation is not None:
        whole = _read(config, config.corpus, tokenizer)
        return (whole, whole) if config.validation is not None else _cut(whole, config)
    documents = _documents(config, config.corpus, tokenizer)
    every = config.validation_every
    if len(documents) < every:
        return _cut(_pack(documents, config), config)
    train = [document for i, document in enumerate(documents) if i % every != every - 1]
    return _pack(train, config), _pack(documents[every - 1 :: every], config)


def _read(config: DataConfig, corpus: str, tokenizer: Tokenizer) -> Packed:
    """All of one corpus."""
    if not is_of_tokens(config, corpus):
        return _pack(_documents(config, corpus, tokenizer), config)
    files, _ = files_of(corpus, config.format)
    if len(files) != 1:
        raise ValueError(f"tokens are read from one file; {corpus!r} has {len(files)}. Name one.")
    tokens = open_tokens(files[0], vocabulary=tokenizer.vocabulary)
    return Packed(tokens=tokens, length=config.sequence_length)


def is_of_tokens(config: DataConfig, corpus: str) -> bool:
    """Whether a corpus is a file of tokens already."""
    return corpus != STDLIB and files_of(corpus, config.format)[1] == "tokens"


def _documents(config: DataConfig, corpus: str, tokenizer: Tokenizer) -> list[Document]:
    documents = list(documents_of(config, corpus, tokenizer))
    if not documents:
        raise ValueError(
            f"data.corpus must hold at least one document; {corpus!r} holds none. "
            "Check the path and data.format."
        )
    return documents


def _pack(documents: Sequence[Document], config: DataConfig) -> Packed:
    tokens = np.concatenate([document.tokens for document in documents]).astype(np.int32)
    counted = [document.counted for document in documents]
    marks = [mark for mark in counted if mark is not None]
    return Packed(
        tokens=tokens,
        length=config.sequence_length,
        counted=np.concatenate(marks) if marks else None,
    )


def _cut(whole: Packed, config: DataConfig) -> tuple[Packed, Packed]:
    """All but the last `1 / validation_every` of the tokens, and those."""
    count = len(whole.tokens)
    cut = count - count // config.validation_every
    parts = (slice(cut), slice(cut, count))
    first, second = (
        Packed(
            tokens=whole.tokens[part],
            length=whole.length,
            counted=None if whole.counted is None else whole.counted[part],
        )
        for part in parts
    )
    return first, second
