# SPDX-License-Identifier: Apache-2.0
"""What ``latest`` says: as saves write it, or as people and scripts do. Standard library only.

Ours has two lines, a tag and the sha256 of its manifest. By hand there is a name alone: with other
line ends, spaces, quotes, a byte order mark, a slash at its end; or a path to a checkpoint of the
same folder; or ``latest`` is a link to one, or a checkpoint itself.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from flora_dist.checkpoint.files import read_plain
from flora_dist.checkpoint.names import LATEST, lost_link

_LARGEST = 1 << 14
"""Room for the longest path of Linux, in two bytes a character."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_QUOTES = "\"'`"


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """What ``latest`` says."""

    tag: str
    """Name of something in its folder."""
    digest: str
    """Of the manifest; empty where written by hand."""


def read_pointer(folder: Path) -> Pointer | None:
    """What ``latest`` of a folder says; None where it is missing or empty.

    Raises:
        ValueError: it is a link that leads nowhere, no file, or says no name of this folder.
    """
    file = folder / LATEST
    if file.is_dir():
        return Pointer(tag=LATEST, digest="")
    if not file.exists():
        if what := lost_link(file):
            raise _wrong(file, what)
        return None
    try:
        text = _decoded(read_plain(file, _LARGEST))
    except (OSError, UnicodeError) as error:
        raise _wrong(file, f"cannot be read: {error}") from error
    lines = [line for line in map(_bare, text.splitlines()) if line]
    if not lines:
        return None
    has_digest = len(lines) == 2 and _DIGEST.fullmatch(lines[1]) is not None
    if len(lines) > 1 and not has_digest:
        raise _wrong(file, f"says {_short(text)!r}, more than one name")
    return Pointer(tag=_name(lines[0], folder), digest=lines[1] if has_digest else "")


def _decoded(raw: bytes) -> str:
    """As editors and shells write text, those of Windows among them."""
    return raw.decode(_MARKS.get(raw[:2], "utf-8-sig"))


def _bare(line: str) -> str:
    line = line.strip().strip("\0")
    if len(line) > 1 and line[0] == line[-1] and line[0] in _QUOTES:
        line = line[1:-1].strip()
    return line


def _name(said: str, folder: Path) -> str:
    """The name that is meant: a path must lead into this folder, from here or from the folder.

    Raises:
        ValueError: it leads elsewhere.
    """
    path = Path(said)
    if said.rstrip("/") == path.name and path.name not in ("", ".."):
        return path.name
    home = folder.resolve()
    for place in (folder / path, Path.cwd() / path):
        # Of the checkpoint itself only the name: it may be a link.
        if place.name not in ("", "..") and place.parent.resolve() == home:
            return place.name
    raise _wrong(folder / LATEST, f"says {_short(said)!r}, which leads out of its folder")


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _wrong(file: Path, what: str) -> ValueError:
    return ValueError(
        f"'latest' must say the name of a checkpoint beside it; '{file}' {what}. Write the name "
        "alone into it, or load a checkpoint by its own path."
    )
