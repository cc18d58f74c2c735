# SPDX-License-Identifier: Apache-2.0
"""A folder of checkpoints that a kill at any instruction leaves with one to load.

    <folder>/latest                     name of the newest checkpoint, sha256 of its manifest
    <folder>/<tag>/                     a checkpoint: its last file is manifest.json
    <folder>/.<tag>.<save>.partial/     one that is being written
    <folder>/.<tag>.<save>.previous/    the old one of a tag, while the new one takes its place
    <folder>/.<tag>.<save>.removed/     one that is being removed
    <folder>/.lock                      while names change

A checkpoint is whole before a rename gives it its name, and keeps no name while it is removed; each
rename is on disk before the next begins. The digest in ``latest`` tells apart what it was written
for and what a flipped bit or a swapped folder makes of it; a name alone, written by hand, counts
too (pointer.py). Each save writes under a name of its own (owners.py), so that a second run in the
folder spoils nothing; it is told, since ``latest`` and ``keep`` are for one. Standard library only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from flora_dist.checkpoint import leftovers, owners
from flora_dist.checkpoint import manifest as manifests
from flora_dist.checkpoint.leftovers import is_whole, looks_ours, previous_of
from flora_dist.checkpoint.lock import locked
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
    wrong_size,
)
from flora_dist.checkpoint.names import (
    LATEST,
    Beside,
    all_beside,
    beside,
    check_tag,
    lost_link,
    tag_of,
)
from flora_dist.checkpoint.pointer import Pointer, read_pointer

__all__ = [
    "VERSION",
    "FileFacts",
    "Json",
    "Manifest",
    "TensorFacts",
    "begin",
    "check_keep",
    "check_tag",
    "discard",
    "has_checkpoint",
    "hash_files",
    "publish",
    "read_manifest",
    "resolve",
    "tag_of",
    "verify_files",
    "write_manifest",
    "wrong_size",
]


def check_keep(keep: int | None) -> None:
    """Refuse to keep no checkpoint.

    Raises:
        ValueError: below 1.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be 1 or more checkpoints; got {keep}. None keeps all.")


def begin(folder: Path, tag: str) -> Path:
    """Clear what dead saves have left, and make the folder that a new checkpoint is written in.

    Warns where another process is saving into the folder at this moment.

    Raises:
        ValueError: the tag is wrong, or its name or that of ``latest`` is taken by something else.
        OSError: the file system.
    """
    check_tag(tag)
    _check_reachable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifests.sync_folder(folder.parent)
    _check_replaceable(folder / tag)
    if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():
        raise ValueError(
            f"'latest' of a folder names its newest checkpoint; '{folder / LATEST}' is a folder. "
            "Give it another name."
        )
    if others := leftovers.clear(folder):
        _warn_of(others[0], folder)
    with locked(folder):
        leftovers.settle_all(folder)
    token = owners.new_token()
    partial = beside(folder, tag, "partial", token)
    owners.under_way(token)  # before there is anything to clear
    partial.mkdir()
    return partial


def discard(partial: Path) -> None:
    """Remove a checkpoint whose save has failed."""
    leftovers.erase(partial)
    owners.done(_token_of(partial))


def publish(partial: Path, tag: str, keep: int | None) -> Path:
    """Give a written checkpoint its name, point ``latest`` at it, remove old ones; its path.

    Args:
        partial: what ``begin`` has made, with its manifest.
        tag: what ``begin`` was called with.
        keep: checkpoints to leave, this one among them; None leaves all. Damaged ones, links, what
            a link beside them leads to, and copies under other names stay.

    Raises:
        ValueError: ``keep``, no readable manifest, or files that somebody took away.
        OSError: the file system.
    """
    check_keep(keep)
    folder, token = partial.parent, _token_of(partial)
    final, aside = folder / tag, beside(folder, tag, "previous", token)
    read_manifest(partial)
    if not is_whole(partial):
        raise ValueError(
            f"a save's files must stay until it ends; of '{partial}' some are gone or changed. "
            "Does another program, or an older flora_dist, clear the folder? Stop it, save again."
        )
    digest = manifests.digest_of(partial) or ""
    with locked(folder):
        _check_replaceable(final)  # it may be another since the save began
        if _is_empty(final):
            final.rmdir()
        elif final.is_symlink() or final.exists():
            leftovers.rename(final, aside)
        leftovers.rename(partial, final)
        leftovers.point(folder, tag, digest)
        doomed = [leftovers.doom(aside, tag)] if aside.is_symlink() or aside.exists() else []
        doomed += [leftovers.doom(old, old.name) for old in _outdated(folder, final, keep)]
    for path in doomed:
        leftovers.erase(path)
    owners.done(token)
    return final


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, damaged or not; False: nothing was ever published.

    Raises:
        ValueError: the folder is a link that leads nowhere; what it led to may hold some.
    """
    _check_reachable(folder)
    if not folder.is_dir():
        return False
    latest = folder / LATEST
    published = latest.is_symlink() or latest.exists() or any(folder.glob(".*.previous"))
    return published or any(map(looks_ours, _folders(folder)))


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the one that ``latest`` of a folder names.

    Where ``latest`` is missing, or the checkpoint that a save wrote it for is gone, the newest
    whole one, with a warning.

    Raises:
        ValueError: no checkpoint, one without a readable manifest, or not the one that ``latest``
            was written for; names the file.
    """
    if not path.exists():  # perhaps killed between the two renames of publish()
        path = next(previous_of(path.parent, path.name), path)
    if (path / manifests.NAME).exists() or looks_ours(path):
        read_manifest(path)
        return path
    if not path.is_dir():
        what = lost_link(path) or ("is not one" if path.exists() else "is not there")
        raise ValueError(
            f"a checkpoint must be a folder; '{path}' {what}. Name a folder that exists."
        )
    return _pointed(path)


def _pointed(folder: Path) -> Path:
    pointer, found, failed = read_pointer(folder), None, None
    try:
        found = None if pointer is None else _named_by(pointer, folder)
    except ValueError as error:
        failed = error
    if found is not None:
        return found
    if read_pointer(folder) != pointer:  # a save came in between
        return _pointed(folder)
    if failed is not None:
        raise failed
    return _newest(folder)


def _named_by(pointer: Pointer, folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None: it was removed since a save wrote that.

    Raises:
        ValueError: it is damaged, another one, or never was there.
    """
    file = folder / LATEST
    places = [folder / pointer.tag, *previous_of(folder, pointer.tag)]
    places = [place for place in places if place.is_dir()]
    if not places:
        _check_gone(pointer, folder)
        return None
    for place in places:
        if pointer.digest in ("", manifests.digest_of(place)):
            read_manifest(place)
            return place
    read_manifest(places[0])  # says more, if it is damaged
    raise ValueError(
        f"a folder's 'latest' must name a checkpoint and the sha256 of its manifest; "
        f"'{file}' has {pointer.digest!r}, '{places[0] / manifests.NAME}' is "
        f"{manifests.digest_of(places[0])}: one of them was changed or swapped. Load a checkpoint "
        "by its own path, or write its name alone into 'latest'."
    )


def _check_gone(pointer: Pointer, folder: Path) -> None:
    """Refuse to take another checkpoint for one that was named by hand, or that was renamed."""
    file, place = folder / LATEST, folder / pointer.tag
    what = "which is not there"
    if lost := lost_link(place):
        what = f"which {lost}"
    elif pointer.digest:
        alike = [p for p in _folders(folder) if manifests.digest_of(p) == pointer.digest]
        if not alike:  # as saves wrote it, and removed since
            return
        what = f"which is not there, with the sha256 of '{alike[0].name}'"
    raise ValueError(
        f"'latest' must name a checkpoint of its folder; '{file}' says {pointer.tag!r}, {what}. "
        "Write the name of one that is there into it, or load a checkpoint by its own path."
    )


def _newest(folder: Path) -> Path:
    what, found = f"'{folder / LATEST}' names no checkpoint that is there", _named(folder)
    if not found:
        raise ValueError(
            f"a folder of checkpoints must hold a whole one; {what}, and no other is whole. "
            "Name another folder."
        )
    warnings.warn(f"{what}; taking the newest whole one, '{found[-1]}'.", stacklevel=4)
    return found[-1]


def _named(folder: Path) -> list[Path]:
    """Whole checkpoints in the order of writing; the old one of a tag where there is no new one."""
    asides = [b for b in all_beside(folder) if b.kind == "previous"]
    places = [aside.path for aside in asides if not (folder / aside.tag).exists()]
    whole = [place for place in (*_folders(folder), *places) if is_whole(place)]
    return sorted(whole, key=lambda place: manifests.serial_of(place / manifests.NAME))


def _outdated(folder: Path, final: Path, keep: int | None) -> list[Path]:
    """Checkpoints beyond ``keep``: only what saves made, under the names that they gave."""
    if keep is None:
        return []
    linked = {path.resolve() for path in folder.iterdir() if path.is_symlink()}
    others = [
        path
        for path in _named(folder)
        if path != final and not path.is_symlink() and leftovers.is_own(path)
    ]
    oldest = others[: max(0, len(others) + 1 - keep)]
    return [path for path in oldest if path.resolve() not in linked]


def _folders(folder: Path) -> Iterator[Path]:
    return (p for p in folder.iterdir() if p.name[0] != "." and p.name != LATEST and p.is_dir())


def _check_reachable(folder: Path) -> None:
    if what := lost_link(folder):
        raise ValueError(
            f"a folder of checkpoints must be within reach; '{folder}' {what}. Mount what it leads "
            "to, or name another folder."
        )


def _check_replaceable(final: Path) -> None:
    """Refuse to put a checkpoint in the place of anything else."""
    if what := lost_link(final):
        raise ValueError(
            f"a new checkpoint must not replace anything else; '{final}' {what}. Mount what it "
            "leads to, or remove the link."
        )
    if final.exists() and not looks_ours(final) and not _is_empty(final):
        raise ValueError(
            f"a new checkpoint must not replace anything else; '{final}' is not a checkpoint. "
            "Save to another folder, or under another tag."
        )


def _is_empty(path: Path) -> bool:
    """Whether a folder, and no link to one, has nothing in it: somebody emptied a checkpoint."""
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def _token_of(partial: Path) -> str:
    return partial.name.removesuffix(".partial").rpartition(".")[2]


def _warn_of(other: Beside, folder: Path) -> None:
    age = max(0.0, owners.silence_of(other.path))
    warnings.warn(
        f"only one run may save into a folder; another process is writing {other.tag!r} into "
        f"'{folder}' too, and last wrote {age:.0f} s ago. Each checkpoint will be complete, but "
        "'latest' names the one that is finished last, and keep= removes checkpoints of both. "
        "Stop one of them, or give each a folder of its own.",
        stacklevel=4,
    )
