# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint: beside its place, whole, verified by hashes, then renamed."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.agreement import Group, agreed, distinct, everyones, place, readable
from flora_dist.checkpoint.boxes import Boxes, BoxSavePlanner
from flora_dist.checkpoint.canonical import Box
from flora_dist.checkpoint.contents import Contents
from flora_dist.checkpoint.folder import FileFacts, Json, Manifest
from flora_dist.checkpoint.stored import METADATA
from flora_dist.checkpoint.target import Target
from flora_dist.version import __version__

T = TypeVar("T")


def write(contents: Contents, target: Target, group: Group = None) -> Path:
    """Save what all ranks of ``group`` hold; the path of the checkpoint.

    Raises:
        ValueError: the disk, or ranks that save different things; older checkpoints stand.
    """
    rank, _ = place(group)
    name = ""
    with agreed(group):
        if rank == 0:
            name = folders.begin(target.folder, target.tag).name
    # Rank 0 names the save; by the others' own paths to the folder, which may differ.
    chosen = everyones((name, target.tag, target.step), group)
    partial = target.folder / chosen[0][0]
    try:
        _check_alike([(tag, step) for _, tag, step in chosen])
        _write_files(contents, partial, group)
        manifest = _manifest(contents, target, _hashed(partial, group), group)
        with agreed(group):
            if rank == 0:
                folders.write_manifest(partial, manifest)
                folders.publish(partial, target.tag, target.keep)
    except BaseException:
        if rank == 0:
            folders.discard(partial)
        raise
    return target.folder / target.tag


def _write_files(contents: Contents, partial: Path, group: Group) -> None:
    with readable(partial):
        dcp_save(
            dict(contents.tensors),
            storage_writer=FileSystemWriter(partial, sync_files=True),
            planner=BoxSavePlanner(),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )


def _hashed(partial: Path, group: Group) -> dict[str, FileFacts]:
    """Every rank's files; each hashes those that it has written."""
    with agreed(group):
        files = folders.hash_files(partial, _own_files(partial, place(group)[0]))
    return {name: facts for part in everyones(files, group) for name, facts in part.items()}


def _manifest(
    contents: Contents, target: Target, files: dict[str, FileFacts], group: Group
) -> Manifest:
    known = distinct((contents.facts(), contents.parameters, contents.groups), group)
    with agreed(group):
        return Manifest(
            step=target.step,
            files=files,
            tensors=_merged([tensors for tensors, _, _ in known]),
            facts={
                "tag": target.tag,  # tells the checkpoint from a copy under another name
                "parameters": _merged([parameters for _, parameters, _ in known]),
                "groups": _distinct([groups for _, _, groups in known]),
                "extra": dict(target.extra),
                "written_by": _versions(place(group)[1]),
            },
        )


def _check_alike(chosen: Sequence[tuple[str, int]]) -> None:
    for rank, each in enumerate(chosen):
        if each != chosen[0]:
            raise ValueError(
                f"all ranks must save the same checkpoint; tag and step are {chosen[0]} on rank 0 "
                f"and {each} on rank {rank}. Pass the same ones everywhere."
            )


def _own_files(partial: Path, rank: int) -> list[str]:
    """Files that this rank has written: DCP names them by rank; rank 0 writes the metadata."""
    own = sorted(path.name for path in partial.glob(f"__{rank}_*"))
    return [*own, METADATA] if rank == 0 else own


def _merged(parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    merged: dict[str, T] = {}
    for part in parts:
        for key, value in part.items():
            if merged.setdefault(key, value) != value:
                raise ValueError(
                    f"ranks must agree on what they save; {key!r} is {merged[key]} on one and "
                    f"{value} on another. Run optimizer.check_consistency()."
                )
    return merged


def _distinct(parts: list[list[Json]]) -> list[Json]:
    """Each group once; ranks whose optimizers hold other parameters have other groups."""
    groups: list[Json] = []
    for part in parts:
        groups += [group for group in part if group not in groups]
    return groups


def _versions(world_size: int) -> dict[str, Json]:
    return {
        "flora_dist": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "world_size": world_size,
    }


# ---- in the background


class Saving:
    """A checkpoint that is being written while training goes on."""

    def __init__(self, work: Callable[[], Path]) -> None:
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._work = work
        # Not a daemon: the interpreter waits for the file system at its end.
        self._thread = threading.Thread(target=self._run, name="flora_dist checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._path = self._work()
        except BaseException as error:  # raised again by wait()
            self._error = error

    def wait(self) -> Path:
        """The checkpoint's path, once it is in place.

        Raises:
            ValueError: as ``save``; what it raised in the background.
        """
        self._thread.join()
        if self in _pending:  # what is said here must not stop the next save
            _pending.remove(self)
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path


_background: list[tuple[object, dist.ProcessGroup]] = []
"""The default group and the thread's own beside it."""
_pending: list[Saving] = []


def write_behind(contents: Contents, target: Target) -> Saving:
    """Copy what this rank holds, then write it in a thread with a process group of its own.

    A second one waits for the first.
    """
    while _pending:
        _pending[-1].wait()
    copied = replace(contents, tensors={k: _copied(b) for k, b in contents.tensors.items()})
    group = _background_group()
    saving = Saving(lambda: write(copied, target, group))
    _pending.append(saving)
    return saving


def _background_group() -> Group:
    """The thread's own: messages of two threads in one group would mix."""
    if not dist.is_initialized():
        return None
    if not _background or _background[0][0] is not dist.group.WORLD:
        _background[:] = [(dist.group.WORLD, dist.new_group(backend="gloo"))]
    return _background[0][1]


def _copied(boxes: Boxes) -> Boxes:
    copies = [
        Box(offsets=box.offsets, values=box.values.detach().to("cpu", copy=True).contiguous())
        for box in boxes.boxes
    ]
    return Boxes(shape=boxes.shape, dtype=boxes.dtype, boxes=copies)
