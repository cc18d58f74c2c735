# SPDX-License-Identifier: Apache-2.0
"""What of a run's own checkpoints is damaged, and which are left to go on from.

Damaged is what no longer is what it was written as: a manifest that is gone or has another hash
than it names, a file that is gone or has another size or hash than the manifest says. Anything
else that does not load is another run's, or a newer program's, and nothing is passed over for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint import manifest as manifests
from flora_dist.checkpoint.agreement import everyones, place
from flora_dist.checkpoint.loading import named_by_latest


def left_in(folder: Path) -> Iterator[Path]:
    """Where the newest was refused: checkpoints whose manifests are whole, newest first.

    From the one that `latest` names on: it may be `latest` alone that is damaged.

    Raises:
        ValueError: what `latest` names is not damaged, but of a newer program.
    """
    try:
        named = named_by_latest(folder)
    except ValueError:  # it says no name, or but a part of what a save wrote
        named = None
    if named is None:
        return older(folder, None)
    if not _has_torn_manifest(named):
        folders.read_manifest(named)
    return older(folder, _step_of(named) + 1)


def older(folder: Path, step: int | None) -> Iterator[Path]:
    """Checkpoints of fewer steps than so many whose manifests are whole, newest first."""
    places = {_step_of(path): path for path in folder.glob("step-*") if path.is_dir()}
    for found in sorted(places, reverse=True):
        is_older = found >= 0 and (step is None or found < step)
        if is_older and not _has_torn_manifest(places[found]):
            yield places[found]


def damage_of(path: Path) -> str | None:
    """What of a checkpoint is damaged, the same on every process, which must all call this.

    None: nothing. Each process looks at its share of the files.
    """
    found = [each for each in everyones(_damage_here(path)) if each is not None]
    return found[0] if found else None


def _damage_here(path: Path) -> str | None:
    try:
        manifest = folders.read_manifest(path)
    except ValueError as error:
        return str(error) if _has_torn_manifest(path) else None
    return folders.verify_files(path, manifest, share=place())


def _has_torn_manifest(path: Path) -> bool:
    """Whether its own hash does not fit it; then nobody knows whose it is."""
    return manifests.serial_of(path / manifests.NAME) == 0


def _step_of(path: Path) -> int:
    """The steps that the name of a checkpoint of the trainer says; -1 for other names."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() and path.name == folders.tag_of(int(number)) else -1
