# SPDX-License-Identifier: Apache-2.0
"""Clears what dead saves have left in a folder of checkpoints, and nothing of anybody else's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from flora_dist.checkpoint import manifest as manifests
from flora_dist.checkpoint import owners
from flora_dist.checkpoint.names import LATEST, Beside, all_beside, beside, tag_of
from flora_dist.checkpoint.pointer import Pointer, read_pointer

_PARTS = ("__*.distcp", "__*.distcp.tmp", ".metadata", ".metadata.tmp", manifests.NAME)
"""What a checkpoint is made of."""


def clear(folder: Path) -> list[Beside]:
    """Remove what dead saves have left.

    Needs no lock, which a full disk might refuse: each name is of one save alone.

    Returns:
        What live ones of other processes are writing now.
    """
    living = []
    for found in list(all_beside(folder)):
        if found.kind == "previous":
            continue
        if found.is_alive:
            living.append(found)
        elif found.token or _is_all_ours(found):
            erase(found.path)
    written = [found for found in living if found.kind == "partial" and found.tag != LATEST]
    return [found for found in written if not (found.token and owners.is_ours(found.token))]


def settle_all(folder: Path) -> None:
    """Finish what dead saves began, under the folder's lock."""
    for aside in list(all_beside(folder)):
        if aside.kind != "previous" or aside.tag == LATEST:
            continue
        # Under the lock nobody is between the renames, unless the file system has no locks.
        is_others = aside.token and not owners.is_ours(aside.token) and aside.is_alive
        if not is_others and (aside.token or looks_ours(aside.path)):
            settle(folder, aside)


def previous_of(folder: Path, tag: str) -> Iterator[Path]:
    """Old checkpoints of a tag that were moved aside for new ones."""
    return (b.path for b in all_beside(folder) if b.kind == "previous" and b.tag == tag)


def is_own(path: Path) -> bool:
    """Whether a whole checkpoint stands under the name that its save gave it."""
    manifest = manifests.read_manifest(path)
    # Earlier versions noted no tag: of theirs only the names by steps are known.
    return manifest.facts.get("tag", tag_of(manifest.step)) == path.name


def is_whole(path: Path) -> bool:
    """Whether the manifest can be read and every file has its size; hashes are for loading."""
    try:
        files = manifests.read_manifest(path).files
    except ValueError:
        return False
    return all(manifests.size_of(path / name) == facts.bytes for name, facts in files.items())


def looks_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours, damaged perhaps, and not something else."""
    names = (manifests.NAME, ".metadata")
    return any((path / name).exists() for name in names) or any(path.glob("*.distcp"))


def _is_all_ours(found: Beside) -> bool:
    """Whether something without a token has nothing in it but what saves write."""
    if found.path.is_symlink():
        return False
    if not found.path.is_dir():
        return found.tag == LATEST
    return looks_ours(found.path) and all(
        any(path.match(part) for part in _PARTS) for path in found.path.iterdir()
    )


# ---- a checkpoint that was being replaced


def settle(folder: Path, aside: Beside) -> None:
    """Finish the replacing of a checkpoint that was killed on the way: forwards, or back."""
    final = folder / aside.tag
    if is_whole(final):
        said = Pointer(tag=aside.tag, digest=manifests.digest_of(aside.path) or "")
        if _pointer_or_none(folder) == said:
            point(folder, aside.tag, manifests.digest_of(final) or "")
        erase(doom(aside.path, aside.tag))
    elif final.is_symlink() or final.exists():
        if is_whole(aside.path) and looks_ours(final):
            erase(doom(final, aside.tag))
            rename(aside.path, final)
    else:
        rename(aside.path, final)


def _pointer_or_none(folder: Path) -> Pointer | None:
    try:
        return read_pointer(folder)
    except ValueError:  # by hand; loading says what is wrong with it
        return None


# ---- names that change in one instruction


def point(folder: Path, tag: str, digest: str) -> None:
    """Make ``latest`` name a checkpoint."""
    partial = beside(folder, LATEST, "partial", owners.new_token())
    try:
        manifests.write_durably(partial, f"{tag}\n{digest}\n".encode())
        rename(partial, folder / LATEST)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path) -> None:
    """In one instruction, and on disk before the next begins."""
    source.replace(target)
    manifests.sync_folder(target.parent)


def doom(path: Path, tag: str) -> Path:
    """Take a checkpoint's name away: half removed it must not pass for whole."""
    doomed = beside(path.parent, tag, "removed", owners.new_token())
    rename(path, doomed)
    return doomed


def erase(path: Path) -> None:
    """Remove a leftover; what NFS holds on to for a reader stays until the next save."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
