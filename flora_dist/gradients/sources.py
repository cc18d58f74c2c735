# SPDX-License-Identifier: Apache-2.0
"""Where full gradients of a parameter arrive, and over which ranks they are averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_dist.core.tiles import Tile
from flora_dist.gradients.average import Route


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """One parameter's gradients on this rank."""

    tensor: Tensor
    """Whose ``.grad`` autograd, or the framework, fills."""
    visible: Tensor | None
    """Whose ``.grad`` the user sees; ``tensor`` itself, or what it was gathered from. None under an
    engine that shows none."""
    tiles: tuple[Tile, ...]
    """What of the parameter a gradient covers: one tile, none where this rank's are empty."""
    route: Route
    is_partial: bool
    """Whether blocks cut by columns have their other pieces on other ranks."""
    device: torch.device | None = None
    """Where gradients arrive; None: where ``tensor`` is."""

    @property
    def in_module(self) -> Tensor:
        """The parameter as its module holds it outside of forward and backward."""
        return self.tensor if self.visible is None else self.visible


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a framework needs around the hooks."""

    sources: Sequence[Source]
    install: Callable[[Sequence[Source]], None]
    """Make the framework leave these gradients alone."""
    restore: Callable[[], None]
    """Undo that."""
    check: Callable[[], None]
    """Raise if the framework was set since to do what would be computed wrong."""


def nothing(*_: object) -> None:
    """For hosts that have nothing to do."""
