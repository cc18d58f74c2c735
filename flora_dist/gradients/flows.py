# SPDX-License-Identifier: Apache-2.0
"""From a parameter and where its gradients arrive to the flow that keeps them as sketches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from flora_dist.core.layouts.dtensor import local_of
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.sketch.keys import Purpose
from flora_dist.core.state.spec import LEVELS, Geometry, geometry_of
from flora_dist.core.step.basis import Sketches
from flora_dist.core.step.batch import arithmetic_dtype
from flora_dist.flora import Flora
from flora_dist.gradients.accumulator import Accumulator
from flora_dist.gradients.cycle import Flow
from flora_dist.gradients.sources import Source

WIRE_DTYPES: Mapping[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""What travels: as accumulated (float64 for float64 parameters), or rounded."""


def check_request(level: str, wire_dtype: str) -> None:
    """Refuse a level or a wire dtype that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if level not in LEVELS[1:]:
        raise ValueError(
            f"gradients must be one of {', '.join(LEVELS[1:])}; got {level!r}. For dense "
            "gradients do not call attach()."
        )
    if wire_dtype not in WIRE_DTYPES:
        raise ValueError(
            f"wire_dtype must be one of {', '.join(WIRE_DTYPES)}; got {wire_dtype!r}. Pass one of "
            "these."
        )


def geometry_for(slot: Trainable, gradient_rank: int | None) -> Geometry:
    """Blocks and numbers per block of a parameter's gradient sketches; None: the group's rank."""
    config = slot.config
    if gradient_rank is not None:
        config = replace(config, rank=gradient_rank)
    return geometry_of(slot.part.name, slot.part.shape, config)


def flow_for(slot: Trainable, source: Source, size: Geometry, optimizer: Flora) -> Flow:
    """A flow that has taken nothing in yet; ``size`` must not be dense."""
    assert size.rank is not None
    tile = source.tiles[0] if source.tiles else None
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
            held=tile.matrices if tile is not None else slot.part.matrices,
            kept=tile.num_blocks(size.block) * size.rank if tile is not None else 0,
        ),
        dtype=arithmetic_dtype(slot.part.weight().dtype),
        next_step=_Counter(ref(optimizer), slot),
    )
    return Flow(
        part=slot.part,
        geometry=size,
        accumulator=accumulator,
        route=source.route,
        is_partial=source.is_partial,
        visible=source.visible,
        is_gathered=source.visible is not None and source.visible is not source.tensor,
        device=local_of(source.tensor).device if source.device is None else source.device,
    )


@dataclass(frozen=True, slots=True)
class _Counter:
    """The coming step of a parameter; the optimizer may be gone before its model is."""

    optimizer: ref[Flora]
    slot: Trainable

    def __call__(self) -> int:
        optimizer = self.optimizer()
        states: Mapping[Tensor, Any] = {} if optimizer is None else optimizer.state
        return self.slot.next_step(states.get(self.slot.tensor, {}))
