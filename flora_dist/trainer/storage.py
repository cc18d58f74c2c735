# SPDX-License-Identifier: Apache-2.0
"""Model and optimizer on disk: what a backend must do, and how torch's backends do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from flora_dist import checkpoint
from flora_dist.checkpoint import Loaded


class Pending(Protocol):
    """A checkpoint that is written, or being written."""

    def wait(self) -> Path:
        """Its path, once it is in place; raises what went wrong."""


class Storage(Protocol):
    """How one backend saves and loads; every process calls it."""

    def save(
        self, folder: Path, *, step: int, extra: Mapping[str, Any], keep: int | None
    ) -> Pending:
        """Begin a checkpoint of the run as it stands."""

    def load(self, path: Path) -> Loaded:
        """Put a checkpoint in place."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint that is in place."""

    path: Path

    def wait(self) -> Path:
        """Its path."""
        return self.path


@dataclass(frozen=True, kw_only=True)
class TorchStorage:
    """Every backend but deepspeed: files are there when `save` returns."""

    module: nn.Module
    """As its backend wrapped it."""
    optimizer: torch.optim.Optimizer

    def save(
        self, folder: Path, *, step: int, extra: Mapping[str, Any], keep: int | None
    ) -> Pending:
        """Write it now."""
        path = checkpoint.save(
            folder, self.module, self.optimizer, step=step, extra=extra, keep=keep
        )
        return Written(path=path)

    def load(self, path: Path) -> Loaded:
        """Put a checkpoint in place."""
        return checkpoint.load(path, self.module, self.optimizer)


@dataclass(frozen=True, kw_only=True)
class TorchStorageBehind:
    """The same, but files are written while training goes on."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def save(
        self, folder: Path, *, step: int, extra: Mapping[str, Any], keep: int | None
    ) -> Pending:
        """Copy the state; one that is still being written is waited for first."""
        return checkpoint.save_async(
            folder, self.module, self.optimizer, step=step, extra=extra, keep=keep
        )

    def load(self, path: Path) -> Loaded:
        """Put a checkpoint in place."""
        return checkpoint.load(path, self.module, self.optimizer)
