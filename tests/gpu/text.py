# SPDX-License-Identifier: Apache-2.0
"""Text that every machine with Python has, as tokens: the Python files of its own libraries.

No tokenizer has to be there: the vocabulary is the bytes, and the most frequent words.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256
HELD_OUT = 50
"""Of so many files one is kept for validation."""
_WORDS = re.compile(rb"[A-Za-z_]\w*| +|\n[ \t]*|[^A-Za-z_]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokens to learn from, and to be judged by."""

    train: Tensor
    validation: Tensor
    words: tuple[bytes, ...]
    """What each token stands for; the first 256 are the bytes."""

    def batch(self, sequences: int, length: int, draw: torch.Generator) -> Tensor:
        """Sequences of length + 1 tokens from random places, int64."""
        starts = torch.randint(len(self.train) - length - 1, (sequences, 1), generator=draw)
        return self.train[starts + torch.arange(length + 1)].long()

    def judged(self, sequences: int, length: int) -> Tensor:
        """The first sequences of validation, int64."""
        return self.validation[: sequences * (length + 1)].view(sequences, length + 1).long()


def python_text(words: int, most_bytes: int) -> Text:
    """The Python files of this machine in a vocabulary of so many tokens, at most so many bytes.

    Raises:
        RuntimeError: this machine has no such files.
    """
    files = list(_files(most_bytes))
    if len(files) < 2:
        raise RuntimeError("the text is Python's own library; this Python has no files of it.")
    train = [content for index, content in enumerate(files) if index % HELD_OUT]
    validation = [content for index, content in enumerate(files) if not index % HELD_OUT]
    counts = Counter(chain.from_iterable(_WORDS.findall(content) for content in train))
    frequent = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    spelled = [bytes([value]) for value in range(BYTES)]
    known = (*spelled, *[word for word, _ in frequent if len(word) > 1][: words - BYTES])
    numbers = {word: number for number, word in enumerate(known)}
    return Text(train=_tokens(train, numbers), validation=_tokens(validation, numbers), words=known)


def _files(most_bytes: int) -> Iterator[bytes]:
    folders = (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent)
    seen: set[bytes] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            if "site-packages" in path.relative_to(folder).parts or content in seen:
                continue
            seen.add(content)
            yield content
            most_bytes -= len(content)
            if most_bytes <= 0:
                return


def _tokens(contents: list[bytes], numbers: dict[bytes, int]) -> Tensor:
    tokens: list[int] = []
    for content in contents:
        for word in _WORDS.findall(content):
            number = numbers.get(word)
            # A word that is not frequent is spelled.
            tokens.extend(word if number is None else (number,))
    return torch.tensor(tokens, dtype=torch.int32)
