# SPDX-License-Identifier: Apache-2.0
"""Names in a folder of checkpoints: tags, and what saves keep beside. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flora_dist.checkpoint import owners
from flora_dist.checkpoint.owners import TOKEN

LATEST = "latest"
_LONGEST_TAG = 200
_BESIDE = re.compile(
    rf"\.(?P<tag>.+?)(?:\.(?P<token>{TOKEN.pattern}))?\.(?P<kind>partial|previous|removed)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Something that a save keeps beside the checkpoints, told by its name alone."""

    path: Path
    tag: str
    """Of the checkpoint; or "latest", while that is being written."""
    kind: str
    """partial, previous or removed."""
    token: str
    """Of the save; empty in names as earlier versions gave them."""

    @property
    def is_alive(self) -> bool:
        """Whether the save that made it may still be running."""
        if not self.token:
            return owners.silence_of(self.path) < owners.STALE_SECONDS
        return owners.is_alive(self.token, self.path)


def tag_of(step: int) -> str:
    """A checkpoint's name, by the steps done.

    >>> tag_of(10)
    'step-00000010'
    """
    return f"step-{step:08d}"


def is_tag(text: str) -> bool:
    """Whether a checkpoint can have this name."""
    plain = text == text.strip() and text.isprintable() and "/" not in text and "\\" not in text
    known = text not in ("", LATEST) and text[0] != "."
    return plain and known and len(text.encode(errors="replace")) <= _LONGEST_TAG


def check_tag(tag: str) -> None:
    """Refuse a tag that is not a plain folder name.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(tag, str) or not is_tag(tag):
        raise ValueError(
            f"a checkpoint's tag must be a plain name that does not begin with a dot, of at most "
            f"{_LONGEST_TAG} bytes, and not 'latest'; got {tag!r}. Name it after its step."
        )


def lost_link(path: Path) -> str:
    """What is wrong with a link that leads nowhere; empty for all else."""
    if path.exists() or not path.is_symlink():
        return ""
    return f"is a link to '{path.readlink()}', which is not there"


def beside(folder: Path, tag: str, kind: str, token: str) -> Path:
    """Where the save of that token keeps something."""
    return folder / f".{tag}.{token}.{kind}"


def all_beside(folder: Path) -> Iterator[Beside]:
    """What saves have left or keep in a folder; other names that begin with a dot are not ours."""
    for path in sorted(folder.glob(".*")):
        match = _BESIDE.fullmatch(path.name)
        if match is not None and (is_tag(match["tag"]) or match["tag"] == LATEST):
            yield Beside(
                path=path, tag=match["tag"], kind=match["kind"], token=match["token"] or ""
            )
