# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint: all is checked and read beside the running state, then put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.agreement import Group, agreed, everyones, place, readable
from flora_dist.checkpoint.boxes import Boxes, BoxPlanner, BoxReader
from flora_dist.checkpoint.folder import Manifest
from flora_dist.checkpoint.manifest import NAME as MANIFEST
from flora_dist.checkpoint.manifest import digest_of
from flora_dist.checkpoint.metadata import read_metadata
from flora_dist.checkpoint.pointer import read_pointer
from flora_dist.checkpoint.stored import METADATA, check_stored


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was loaded."""

    path: Path
    """The checkpoint."""
    step: int
    """Steps done when it was written."""
    extra: dict[str, Any]
    """What its writer kept with it."""


class Fitted(Protocol):
    """Fresh tensors for what a manifest lists, as this rank's model holds it."""

    @property
    def tensors(self) -> Mapping[str, Boxes]:
        """To be read into."""

    def put_in_place(self) -> None:
        """Replace the running state by what was read; must not fail."""


def read(path: Path, fit: Callable[[Manifest], Fitted], group: Group = None) -> Loaded:
    """Load a checkpoint, or the newest of a folder, on every rank of ``group``.

    ``fit`` compares the manifest with the running model and changes nothing; without messages.

    Raises:
        ValueError: on every rank, naming file and field; the running state is as it was.
    """
    where, manifest, digest = _open(path, group)
    with agreed(group), _undisturbed(where, digest):
        _raise(folders.wrong_size(where, manifest, share=place(group)))
    with agreed(group), _undisturbed(where, digest):
        # Before memory is made for tensors: a forged size would ask for more than there is.
        check_stored(_metadata(where, manifest), manifest, where)
        fitted = fit(manifest)
    with agreed(group), _undisturbed(where, digest):
        _raise(folders.verify_files(where, manifest, share=place(group)))
    with agreed(group), _undisturbed(where, digest):
        _read_boxes(where, fitted.tensors)
    fitted.put_in_place()
    extra = manifest.facts.get("extra")
    return Loaded(
        path=where, step=manifest.step, extra=dict(extra) if isinstance(extra, dict) else {}
    )


def named_by_latest(folder: Path) -> Path | None:
    """What ``latest`` of a folder names, damaged perhaps; None: nothing that is there."""
    pointer = read_pointer(folder)
    path = None if pointer is None else folder / pointer.tag
    return path if path is not None and path.is_dir() else None


def _open(path: Path, group: Group) -> tuple[Path, Manifest, str | None]:
    """Rank 0 says which: a checkpoint that comes meanwhile must not divide the ranks."""
    found: Path | None = None
    with agreed(group):
        if place(group)[0] == 0:
            found = folders.resolve(path)
    where = everyones(found, group)[0]
    assert where is not None
    with agreed(group):
        digest = digest_of(where)
        manifest = folders.read_manifest(where)
    return where, manifest, digest


def _raise(error: str | None) -> None:
    if error is not None:
        raise ValueError(error)


def _metadata(where: Path, manifest: Manifest) -> Metadata:
    """What DCP has stored, by a file whose hash fits.

    Raises:
        ValueError: the manifest does not list it, or it was changed.
    """
    facts = manifest.files.get(METADATA)
    if facts is None:
        raise ValueError(
            f"a checkpoint's manifest must list all its files; '{where / MANIFEST}' lacks "
            f"{METADATA!r}. Load another checkpoint."
        )
    alone = replace(manifest, files={METADATA: facts})
    _raise(folders.verify_files(where, alone, share=(0, 1)))
    return read_metadata(where / METADATA)


@contextmanager
def _undisturbed(where: Path, digest: str | None) -> Iterator[None]:
    """Refuse parts of two checkpoints: a save may put a new one in the place of the old.

    No two manifests of a folder are alike: they count its saves.
    """
    failed: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failed = error
    if digest_of(where) != digest:
        raise ValueError(
            f"a checkpoint must not change while it is read; '{where}' was replaced or removed "
            "meanwhile by another save. Load it again."
        ) from failed
    if failed is not None:
        raise failed


def _read_boxes(where: Path, tensors: Mapping[str, Boxes]) -> None:
    """Each rank for itself, so that no message is due where one fails."""
    with readable(where):
        dcp_load(dict(tensors), storage_reader=BoxReader(where), planner=BoxPlanner(), no_dist=True)
