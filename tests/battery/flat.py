# SPDX-License-Identifier: Apache-2.0
"""All parameters in one line, each rank owning a span of it, as ZeRO and FSDP1 have it.

Cuts are placed where they hurt: twice in one row, inside blocks, inside an expert, and one rank
owns nothing.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.comm.groups import GroupReducer
from flora_dist.core.layouts.flat import FlatLayout, Span


def layout_of(flat: Tensor, shapes: dict[str, tuple[int, ...]], bounds: list[int]) -> FlatLayout:
    """Knows one flat tensor: the span [bounds[rank], bounds[rank + 1]) of the line."""
    rank, start, spans = dist.get_rank(), 0, []
    for name, shape in shapes.items():
        stop = start + torch.Size(shape).numel()
        inside = [min(max(bound, start), stop) - start for bound in bounds]
        offset = max(0, start - bounds[rank])
        owned = tuple(itertools.pairwise(inside))
        spans.append(Span(name=name, shape=shape, owned=owned, offset=offset))
        start = stop
    world = dist.group.WORLD
    assert world is not None
    reducer = GroupReducer(group=world) if len(bounds) > 2 else None
    layout = FlatLayout()
    layout.add(flat, spans, rank=rank, reducer=reducer)
    return layout


def bounds_of(shapes: dict[str, tuple[int, ...]], world_size: int) -> list[int]:
    """Where the line is cut: rank r owns [bounds[r], bounds[r + 1])."""
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += torch.Size(shape).numel()
    up, experts = starts["up.weight"], starts["experts"]
    cuts = {
        1: [],
        2: [up + 45],
        3: [up + 45, up + 52],  # both in one row, both inside blocks
        4: [experts + 70, experts + 70, experts + 150],  # inside experts; rank 1 owns nothing
    }
    return [0, *cuts[world_size], total]
