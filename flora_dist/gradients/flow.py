# SPDX-License-Identifier: Apache-2.0
"""A parameter's way from backward to step, and what a framework's file has to say about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from flora_dist.core.layouts.dtensor import local_of
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.protocols import Part
from flora_dist.core.sketch.keys import Purpose
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Sketches
from flora_dist.core.step.batch import arithmetic_dtype
from flora_dist.core.tiles import Tile
from flora_dist.gradients.accumulator import Accumulator, StepCounter
from flora_dist.gradients.request import SketchRequest
from flora_dist.gradients.route import Route


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Where one parameter's full gradients arrive on this rank."""

    tensor: Tensor
    """Whose ``.grad`` autograd, or the framework, fills."""
    visible: Tensor | None
    """Whose ``.grad`` the user sees; ``tensor`` itself, or what it was gathered from. None under an
    engine that shows none."""
    tiles: tuple[Tile, ...]
    """What of the parameter a gradient covers: one tile, none where this rank's are empty."""
    route: Route
    is_partial: bool = False
    """Whether blocks cut by columns have their other pieces on other ranks (tensor parallelism)."""
    device: torch.device | None = None
    """Where gradients arrive; None: where ``tensor`` is."""

    @property
    def in_module(self) -> Tensor:
        """The parameter as its module holds it outside of forward and backward."""
        return self.tensor if self.visible is None else self.visible


def nothing(*_: object) -> None:
    """For frameworks that need nothing done."""


def never() -> bool:
    """For frameworks that average nothing."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a framework needs around the hooks."""

    sources: Sequence[Source]
    install: Callable[[Sequence[Source]], None] = nothing
    """Make the framework leave these gradients alone."""
    restore: Callable[[], None] = nothing
    """Undo that."""
    watched: Sequence[tuple[object, str]] = ()
    """Objects of the framework, and an attribute of each that stands for what would be computed
    wrong if it were set."""
    check: Callable[[], None] | None = None
    """Raises if one is."""
    is_last: Callable[[], bool] = never
    """Whether the gradients that arrive now are of the last micro-batch before the step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flow:
    """One parameter between backward and step."""

    part: Part
    """What of the parameter is stepped here."""
    geometry: Geometry
    """In blocks and numbers per block of the gradient's sketches."""
    accumulator: Accumulator
    source: Source
    first_matrix: int
    """Of the part."""
    matrices: slice
    """The part's, among those of the accumulator."""


def geometry_for(slot: Trainable, request: SketchRequest) -> Geometry:
    """Blocks and numbers per block of a parameter's gradient sketches."""
    return request.geometry(slot.part.name, slot.part.shape, slot.config)


def flow_for(
    slot: Trainable,
    source: Source,
    size: Geometry,
    optimizer: torch.optim.Optimizer,
) -> Flow:
    """A flow that has taken nothing in yet; ``size`` must not be dense."""
    assert size.rank is not None
    tile = source.tiles[0] if source.tiles else None
    own = slot.part.matrices
    held = own if tile is None else tile.matrices
    accumulator = Accumulator(
        name=slot.part.name,
        geometry=size,
        tile=tile,
        sketches=Sketches(
            name_key=slot.name_key,
            purpose=Purpose.GRADIENT,
            rank=size.rank,
            block=size.block,
            config=slot.config,
            held=held,
            kept=0 if tile is None else tile.num_blocks(size.block) * size.rank,
        ),
        dtype=arithmetic_dtype(slot.part.weight().dtype),
        device=source.device or local_of(source.tensor).device,
        next_step=StepCounter(ref(optimizer), slot),
    )
    accumulator.replica = source.route.replica
    return Flow(
        part=slot.part,
        geometry=size,
        accumulator=accumulator,
        source=source,
        first_matrix=own[0],
        matrices=slice(own[0] - held[0], own[1] - held[0]),
    )
