# SPDX-License-Identifier: Apache-2.0
"""Basic save and resume through torch DCP: all or nothing on disk, refused where it does not fit.

DCP's own files hold pickles: a checkpoint is as trusted as the program that wrote it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.lr_scheduler import LambdaLR

from flora_dist.trainer.backend import wait_for_all
from flora_dist.trainer.spread import World

_FACTS = "trainer.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often a run saves itself."""

    folder: Path
    """Parent of the checkpoints."""
    every: int | None
    """Steps between two; None saves none."""
    identity: Mapping[str, Any]
    """What a run that resumes must have in common, by name."""
    world: World
    """The processes."""

    def maybe_save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR
    ) -> None:
        """Save after `step` steps if one is due.

        The files are written beside the target and renamed at the end, so a folder with the final
        name is whole.
        """
        if self.every is None or step % self.every:
            return
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".step-{step:08d}.partial"
        if self.world.speaks:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait_for_all()
        weights, state = get_state_dict(model, optimizer)
        with _one_process_is_meant():
            save({"model": weights, "optimizer": state}, checkpoint_id=partial)
        if self.world.speaks:
            facts = {
                "step": step,
                "identity": dict(self.identity),
                "schedule": _numbers(scheduler.state_dict()),
            }
            (partial / _FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
            aside = self.folder / f".step-{step:08d}.replaced"
            if final.exists():  # the same step, taken again after a resume
                final.rename(aside)
            partial.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        wait_for_all()


def check_checkpoint(folder: Path, identity: Mapping[str, Any]) -> int:
    """The step a checkpoint was written at, after comparing what it must share with this run.

    Raises:
        ValueError: no checkpoint, or one of another model, seed, optimizer or corpus.
    """
    path = folder / _FACTS
    if not path.is_file():
        raise ValueError(
            f"checkpoint.resume must name a folder this trainer wrote; {str(folder)!r} has no "
            f"{_FACTS}. Name a step-... folder below <run>/checkpoints."
        )
    facts = json.loads(path.read_text(encoding="utf-8"))
    theirs, ours = facts["identity"], json.loads(json.dumps(dict(identity)))
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        listed = "; ".join(_difference(name, theirs.get(name), ours[name]) for name in different)
        raise ValueError(
            f"a checkpoint must come from the same run; {str(folder)!r} differs: {listed}. "
            "Restore the config it was written with, or start afresh with checkpoint.resume: null."
        )
    return int(facts["step"])


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR
) -> None:
    """Put a checkpoint's weights, optimizer state and schedule in place."""
    weights, state = get_state_dict(model, optimizer)
    with _one_process_is_meant():
        load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    scheduler.load_state_dict(facts["schedule"] | {"lr_lambdas": [None] * len(scheduler.base_lrs)})


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without a process group DCP warns that it takes this process for the only one: it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
        yield


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule's state without its functions, which come from the config."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"}


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)]
        return ", ".join(f"{name}.{k} was {theirs.get(k)!r}, is {ours.get(k)!r}" for k in keys)
    return f"{name} was {theirs!r}, is {ours!r}"
