# SPDX-License-Identifier: Apache-2.0
"""A folder of checkpoints that a kill at any instruction leaves with one to load.

    <folder>/latest                     name of the newest checkpoint, sha256 of its manifest
    <folder>/<tag>/                     a checkpoint: its last file is manifest.json
    <folder>/.<tag>.partial/            one that is being written
    <folder>/.<tag>.previous/           the old one of a tag, while the new one takes its place
    <folder>/.<name>.removed/           one that is being removed

A checkpoint is whole before a rename gives it its name, and keeps no name while it is removed; each
rename is on disk before the next begins. The digest in ``latest`` tells apart what it was written
for and what a flipped bit or a swapped folder makes of it; a name alone, written by hand, counts
too. One run writes to a folder at a time. Standard library only.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flora_dist.checkpoint import manifest as manifests
from flora_dist.checkpoint.manifest import (
    VERSION,
    FileFacts,
    Json,
    Manifest,
    TensorFacts,
    hash_files,
    read_manifest,
    verify_files,
    write_manifest,
)

__all__ = [
    "VERSION",
    "FileFacts",
    "Json",
    "Manifest",
    "TensorFacts",
    "begin",
    "check_keep",
    "check_tag",
    "has_checkpoint",
    "hash_files",
    "publish",
    "read_manifest",
    "resolve",
    "tag_of",
    "verify_files",
    "write_manifest",
]

_LATEST = "latest"
_LONGEST_TAG = 200


@dataclass(frozen=True, kw_only=True)
class _Pointer:
    """What ``latest`` says."""

    tag: str
    digest: str
    """Of the manifest; empty where written by hand."""


def tag_of(step: int) -> str:
    """A checkpoint's name, by the steps done.

    >>> tag_of(10)
    'step-00000010'
    """
    return f"step-{step:08d}"


def check_tag(tag: str) -> None:
    """Refuse a tag that is no plain name of a folder.

    Raises:
        ValueError: naming it.
    """
    plain = tag == tag.strip() and tag.isprintable() and "/" not in tag and "\\" not in tag
    if not plain or tag in ("", _LATEST) or tag[0] == "." or len(tag.encode()) > _LONGEST_TAG:
        raise ValueError(
            f"a checkpoint's tag must be a plain name that does not begin with a dot, of at most "
            f"{_LONGEST_TAG} bytes, and not 'latest'; got {tag!r}. Name it after its step."
        )


def check_keep(keep: int | None) -> None:
    """Refuse to keep no checkpoint.

    Raises:
        ValueError: below 1.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be 1 or more checkpoints; got {keep}. None keeps all.")


def begin(folder: Path, tag: str) -> Path:
    """Clear what dead saves have left, and make the folder that a new checkpoint is written in.

    Raises:
        ValueError: the tag, or something of that name that is no checkpoint.
        OSError: the file system.
    """
    check_tag(tag)
    folder.mkdir(parents=True, exist_ok=True)
    manifests.sync_folder(folder.parent)
    final = folder / tag
    if final.exists() and not _looks_ours(final):
        raise ValueError(
            f"a new checkpoint must not replace anything else; '{final}' is no checkpoint. "
            "Save to another folder, or under another tag."
        )
    for leftover in [*folder.glob(".*.partial"), *folder.glob(".*.removed")]:
        _erase(leftover)
    for aside in list(folder.glob(".*.previous")):
        _settle(folder, aside)
    partial = _partial(folder, tag)
    partial.mkdir()
    return partial


def publish(folder: Path, tag: str, keep: int | None) -> Path:
    """Give a written checkpoint its name, point ``latest`` at it, remove old ones; its path.

    Args:
        folder: of the checkpoints.
        tag: what ``begin`` was called with.
        keep: checkpoints to leave, this one among them; None leaves all. Damaged ones stay.

    Raises:
        ValueError: ``keep``, or no readable manifest.
        OSError: the file system.
    """
    check_keep(keep)
    partial, final, aside = _partial(folder, tag), folder / tag, _aside(folder, tag)
    read_manifest(partial)
    if final.exists():
        _rename(final, aside)
    _rename(partial, final)
    _point(folder, tag)
    if aside.exists():
        _remove(aside)
    if keep is not None:
        others = [path for path in _named(folder) if path != final]
        for old in others[: max(0, len(others) + 1 - keep)]:
            _remove(old)
    return final


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, damaged or not; False: nothing was ever published."""
    if not folder.is_dir():
        return False
    published = [*folder.glob(_LATEST), *folder.glob(".*.previous")]
    return bool(published) or any(map(_looks_ours, _folders(folder)))


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the one that ``latest`` of a folder names.

    Where ``latest`` is missing or what it names is gone, the newest whole one, with a warning.

    Raises:
        ValueError: no checkpoint, one without a readable manifest, or not the one that ``latest``
            was written for; names the file.
    """
    aside = _aside(path.parent, path.name)
    if not path.exists() and aside.is_dir():  # killed between the two renames of publish()
        path = aside
    if (path / manifests.NAME).exists() or _looks_ours(path):
        read_manifest(path)
        return path
    if not path.is_dir():
        raise ValueError(f"a checkpoint must be a folder; '{path}' is none. Name one that is.")
    pointer = _pointer(path)
    places = [] if pointer is None else [path / pointer.tag, _aside(path, pointer.tag)]
    places = [place for place in places if place.is_dir()]
    if pointer is None or not places:
        return _newest(path)
    for place in places:
        if pointer.digest in ("", manifests.digest_of(place)):
            read_manifest(place)
            return place
    read_manifest(places[0])  # says more, if it is damaged
    raise ValueError(
        f"a folder's 'latest' must name a checkpoint and the sha256 of its manifest; "
        f"'{path / _LATEST}' has {pointer.digest!r}, '{places[0] / manifests.NAME}' is "
        f"{manifests.digest_of(places[0])}: one of them was changed or swapped. Load a checkpoint "
        "by its own path, or write its name alone into 'latest'."
    )


def _newest(folder: Path) -> Path:
    what = f"'{folder / _LATEST}' names no checkpoint that is there"
    found = _named(folder)
    if not found:
        raise ValueError(
            f"a folder of checkpoints must hold a whole one; {what}, and no other is whole. "
            "Name another folder."
        )
    warnings.warn(f"{what}; taking the newest whole one, '{found[-1]}'.", stacklevel=3)
    return found[-1]


def _named(folder: Path) -> list[Path]:
    """Whole checkpoints in the order of writing; the old one of a tag where there is no new one."""
    asides = folder.glob(".*.previous")
    places = [aside for aside in asides if not (folder / _tag_of_aside(aside)).exists()]
    whole = [place for place in (*_folders(folder), *places) if _is_whole(place)]
    return sorted(whole, key=lambda place: manifests.serial_of(place / manifests.NAME))


def _folders(folder: Path) -> Iterator[Path]:
    return (p for p in folder.iterdir() if p.name[0] != "." and p.is_dir())


def _is_whole(path: Path) -> bool:
    """Whether the manifest can be read and every file has its size; hashes are for loading."""
    try:
        files = read_manifest(path).files
    except ValueError:
        return False
    return all(manifests.size_of(path / name) == facts.bytes for name, facts in files.items())


def _looks_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint, damaged perhaps, and none of somebody else's."""
    names = (manifests.NAME, ".metadata")
    return any((path / name).exists() for name in names) or any(path.glob("*.distcp"))


def _settle(folder: Path, aside: Path) -> None:
    """Finish the replacing of a checkpoint that was killed on the way: forwards, or back."""
    tag = _tag_of_aside(aside)
    final = folder / tag
    if _is_whole(final):
        if _pointer(folder) == _Pointer(tag=tag, digest=manifests.digest_of(aside) or ""):
            _point(folder, tag)
        _remove(aside)
    elif _is_whole(aside):
        if final.exists():
            _remove(final)
        _rename(aside, final)
    else:
        _remove(aside)


def _point(folder: Path, tag: str) -> None:
    """Make ``latest`` name a checkpoint, in one instruction."""
    partial = _partial(folder, _LATEST)
    digest = manifests.digest_of(folder / tag)
    manifests.write_durably(partial, f"{tag}\n{digest}\n".encode())
    _rename(partial, folder / _LATEST)


def _pointer(folder: Path) -> _Pointer | None:
    """What ``latest`` says; None if it is missing or says no tag."""
    file = folder / _LATEST
    if not file.is_file():
        return None
    tag, _, digest = file.read_bytes().decode(errors="replace").partition("\n")
    try:
        check_tag(tag)
    except ValueError:
        return None
    return _Pointer(tag=tag, digest=digest.strip())


def _rename(source: Path, target: Path) -> None:
    """In one instruction, and on disk before the next begins."""
    source.replace(target)
    manifests.sync_folder(target.parent)


def _remove(path: Path) -> None:
    """Take a checkpoint's name away, then its files: half removed it must not pass for whole."""
    doomed = path.with_name(f".{path.name.removeprefix('.')}.removed")
    _erase(doomed)
    _rename(path, doomed)
    _erase(doomed)


def _erase(path: Path) -> None:
    """Remove a leftover; what NFS holds on to for a reader stays until the next save."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _partial(folder: Path, tag: str) -> Path:
    return folder / f".{tag}.partial"


def _aside(folder: Path, tag: str) -> Path:
    return folder / f".{tag}.previous"


def _tag_of_aside(aside: Path) -> str:
    return aside.name.removeprefix(".").removesuffix(".previous")
