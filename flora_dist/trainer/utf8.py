# SPDX-License-Identifier: Apache-2.0
"""Text files that must be UTF-8: one that is not is named, with the place in it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 1 << 20


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8; names file and byte.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, error.start, error.object[error.start])) from error


def first_not_utf8(files: Iterable[Path]) -> str | None:
    """What to say of the first file that is not UTF-8, None if all are; reads piece by piece."""
    for path in files:
        decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
        with path.open("rb") as file:
            while True:
                chunk = file.read(_CHUNK)
                read += len(chunk)
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    # Its object begins with what the decoder held back of the chunk before.
                    offset = read - len(error.object) + error.start
                    return _not_utf8(path, offset, error.object[error.start])
                if not chunk:
                    break
    return None


def _not_utf8(path: Path, offset: int, byte: int) -> str:
    return (
        f"text must be UTF-8; '{path}' has the byte 0x{byte:02x} at offset {offset}, which is not. "
        f"Convert the file, for example with `iconv -f WINDOWS-1252 -t UTF-8`, or leave it out."
    )
