# SPDX-License-Identifier: Apache-2.0
"""Save and load a model and its optimizer, whoever wrote the checkpoint and on whatever layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint import saving, torch_states
from flora_dist.checkpoint.agreement import agreed
from flora_dist.checkpoint.contents import Contents, gather, others_of
from flora_dist.checkpoint.fitting import fit
from flora_dist.checkpoint.folder import Json
from flora_dist.checkpoint.loading import Loaded, read
from flora_dist.checkpoint.saving import Saving, write, write_behind
from flora_dist.checkpoint.target import target_of
from flora_dist.flora import Flora

__all__ = ["Loaded", "Saving", "latest", "load", "save", "save_async"]


def save(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    extra: Mapping[str, Json] | None = None,
    keep: int | None = None,
    tag: str | None = None,
) -> Path:
    """Save weights, persistent buffers, optimizer state and settings; every rank calls it.

    It is written beside its place and renamed when whole; ``latest`` names it last.

    Args:
        folder: of the run's checkpoints, on storage that every rank sees.
        model: plain or in DDP, FSDP1, FSDP2, HSDP, tensor parallelism. DeepSpeed has its own
            ``flora_dist.deepspeed.save_checkpoint``, of the same format.
        optimizer: Flora; or another of torch, on plain models, DDP and DTensors.
        step: steps done.
        extra: numbers, words, lists and mappings of the caller's own, as JSON; copied.
        keep: checkpoints to keep, this one among them; None: all.
        tag: the checkpoint's name; None: step-00000010.

    Returns:
        The checkpoint's path.

    Raises:
        ValueError: on every rank; between the micro-batches of a step whose gradients are sketched,
            or what the disk refused. Older checkpoints stand.
    """
    with agreed():
        target = target_of(folder, step=step, extra=extra, keep=keep, tag=tag)
        contents = _contents(model, optimizer)
    return write(contents, target)


def save_async(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    extra: Mapping[str, Json] | None = None,
    keep: int | None = None,
    tag: str | None = None,
) -> Saving:
    """As ``save``, but only copies before it returns; training may go on while files are written.

    A second one first waits for the one before. ``wait()`` before the process ends.
    """
    with agreed():
        target = target_of(folder, step=step, extra=extra, keep=keep, tag=tag)
        contents = _contents(model, optimizer)
    return write_behind(contents, target)


def forget_groups() -> None:
    """Let go of the process groups that ``save_async`` knows, for the program to close them.

    After the last ``wait()``; the next ``save_async`` makes its own anew.
    """
    saving._background.clear()


def load(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Loaded:
    """Load what any layout and number of processes has saved; every rank calls it.

    Settings of groups are those saved. Weights are rounded to the model's dtype if that is lower;
    state has its own dtypes bit for bit. Same layout: the run goes on bit for bit.

    Args:
        path: a checkpoint, or the folder of several: then the newest.
        model: wrapped as it will train.
        optimizer: built over it, with the seed of the run that saved.

    Raises:
        ValueError: on every rank, naming file and field: a file that is torn, changed or of a newer
            version, another model, optimizer or seed. The running state is as it was then.
    """
    if isinstance(optimizer, Flora):
        loaded = read(
            Path(path), lambda manifest: fit(manifest, optimizer, others_of(model, optimizer))
        )
        optimizer.check_consistency()
        return loaded
    return read(Path(path), lambda manifest: torch_states.fit(manifest, model, optimizer))


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder; None if it has none."""
    path = Path(folder)
    return folders.resolve(path) if folders.has_checkpoint(path) else None


def _contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contents:
    if isinstance(optimizer, Flora):
        return gather(optimizer, others_of(model, optimizer))
    return torch_states.gather(model, optimizer)
