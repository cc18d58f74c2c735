# SPDX-License-Identifier: Apache-2.0
"""Text to token numbers: raw bytes, or any tokenizer a local folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flora_dist.trainer.config import BYTE
from flora_dist.trainer.optional_imports import needs_train_extra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer."""

    vocabulary: int
    """Number of distinct tokens, the end-of-document token included."""
    end: int
    """The token put behind every document."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token numbers of one document, without any special token."""


class ByteTokenizer:
    r"""The 256 byte values of UTF-8, and 256 for the end of a document.

    >>> ByteTokenizer().encode("a\n").tolist(), ByteTokenizer().vocabulary
    ([97, 10], 257)
    """

    vocabulary = 257
    end = 256

    def encode(self, text: str) -> NDArray[np.int32]:
        """One token per byte; characters UTF-8 cannot hold become '?'."""
        import numpy as np

        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int32)


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
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"data.tokenizer must be 'byte' or a folder that holds a tokenizer; "
                f"{str(folder)!r} gave: {error} Code that comes with it is never run. Save one "
                "there with tokenizer.save_pretrained."
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                f"data.tokenizer must have an end-of-text token, which separates the documents; "
                f"{str(folder)!r} has none. Set its eos_token."
            )
        self.vocabulary: int = len(self._tokenizer)
        self.end: int = self._tokenizer.eos_token_id

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token numbers without special tokens; documents may be longer than any model."""
        import numpy as np

        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int32)


def open_tokenizer(name: str) -> Tokenizer:
    """The byte tokenizer, or the one in the folder `name`."""
    return ByteTokenizer() if name == BYTE else FolderTokenizer(Path(name))
