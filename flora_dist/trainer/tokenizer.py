# SPDX-License-Identifier: Apache-2.0
"""Text to token numbers: raw bytes, or any tokenizer a local folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flora_dist.trainer.config_data import BYTE
from flora_dist.trainer.optional_imports import needs_train_extra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_END = "<|endoftext|>"
_NO_TEMPLATE = (
    "conversations need a tokenizer with a chat template; data.tokenizer={!r} has none. Name the "
    "folder of one, or use data.prompt and data.response."
)


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer."""

    vocabulary: int
    """Number of distinct tokens, the end-of-document token included."""
    end: int
    """The token put behind every document."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token numbers of one document, without any special token."""

    has_template: bool
    """Whether it knows how a conversation is written."""

    def chat(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token numbers of a conversation, and which of them are the assistant's.

        Raises:
            ValueError: no template, or one that does not tell the turns apart.
        """

    def save(self, folder: Path) -> None:
        """Write it as `save_pretrained` does."""


class ByteTokenizer:
    r"""The 256 byte values of UTF-8, and 256 for the end of a document.

    >>> ByteTokenizer().encode("a\n").tolist(), ByteTokenizer().vocabulary
    ([97, 10], 257)
    """

    vocabulary = 257
    end = 256
    has_template = False

    def encode(self, text: str) -> NDArray[np.int32]:
        """One token per byte; characters UTF-8 cannot hold become '?'."""
        import numpy as np

        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int32)

    def chat(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Refused: bytes have no turns."""
        del messages
        raise ValueError(_NO_TEMPLATE.format("byte"))

    def save(self, folder: Path) -> None:
        """Write the same tokenizer in the form of transformers."""
        with needs_train_extra():
            from tokenizers import Tokenizer as Fast
            from tokenizers import decoders, models, pre_tokenizers
            from transformers import PreTrainedTokenizerFast
        numbers = {letter: number for number, letter in enumerate(_letters_of_bytes())}
        fast = Fast(models.BPE(vocab=numbers | {_END: self.end}, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        kind: Any = PreTrainedTokenizerFast
        kind(tokenizer_object=fast, eos_token=_END).save_pretrained(folder)


def _letters_of_bytes() -> list[str]:
    """The letter that stands for each byte value in byte-level vocabularies (GPT-2's).

    Bytes that Latin-1 prints stand for themselves, the others for letters from 256 on.

    >>> _letters_of_bytes()[ord("A")], _letters_of_bytes()[ord(" ")]
    ('A', 'Ġ')
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


class FolderTokenizer:
    """A Hugging Face tokenizer from a local folder."""

    def __init__(self, folder: Path) -> None:
        """Load it without the network.

        Raises:
            ValueError: the folder holds no tokenizer, or one without an end-of-text token.
        """
        with needs_train_extra():
            from transformers import AutoTokenizer
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # what the tokenizers' Rust raises has no type of its own
            raise ValueError(
                f"data.tokenizer must be 'byte' or a folder that holds a tokenizer; "
                f"{str(folder)!r} gave: {' '.join(str(error).split())} Code that comes with it is "
                "never run. Save one there with tokenizer.save_pretrained."
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                f"data.tokenizer must have an end-of-text token, which separates the documents; "
                f"{str(folder)!r} has none. Set its eos_token."
            )
        self.vocabulary: int = len(self._tokenizer)
        self.end: int = self._tokenizer.eos_token_id
        self.has_template = bool(self._tokenizer.chat_template)
        self._folder = folder

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token numbers without special tokens; documents may be longer than any model."""
        import numpy as np

        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def chat(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """By the template's own marks of what is generated, else by the lengths of its beginnings.

        Raises:
            ValueError: no template, one that refuses the conversation, or one whose text of a turn
                changes with the turns behind it.
        """
        import numpy as np

        if not self.has_template:
            raise ValueError(_NO_TEMPLATE.format(str(self._folder)))
        try:
            tokens, counted = self._templated(list(messages))
        except Exception as error:  # a template may raise what it likes
            raise ValueError(
                f"the chat template of {str(self._folder)!r} must write every conversation; of "
                f"{list(messages)!r} it says: {error} Correct that row or the template."
            ) from error
        return np.asarray(tokens, dtype=np.int32), np.asarray(counted, dtype=np.bool_)

    def _templated(self, messages: list[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        if "{% generation" in self._tokenizer.chat_template.replace("{%-", "{%"):
            encoded = self._tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        whole = self._written(messages, goes_on=False)
        counted = [False] * len(whole)
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._written(messages[:place], goes_on=True)
            until = self._written(messages[: place + 1], goes_on=False)
            if whole[: len(until)] != until or until[: len(before)] != before:
                raise ValueError(
                    "its text of a turn changes with the turns behind it, so nobody can tell what "
                    "the assistant says; it needs {% generation %} marks."
                )
            counted[len(before) : len(until)] = [True] * (len(until) - len(before))
        return whole, counted

    def _written(self, messages: list[Mapping[str, str]], *, goes_on: bool) -> list[int]:
        encoded = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=goes_on, return_dict=True
        )
        return list(encoded["input_ids"])

    def save(self, folder: Path) -> None:
        """Write it anew."""
        self._tokenizer.save_pretrained(folder)


def open_tokenizer(name: str) -> Tokenizer:
    """The byte tokenizer, or the one in the folder `name`."""
    return ByteTokenizer() if name == BYTE else FolderTokenizer(Path(name))
