# SPDX-License-Identifier: Apache-2.0
"""What becomes of each parameter's gradient: sketched or dense and why, bytes kept and sent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flora_dist.columns import aligned
from flora_dist.core.records import Code, mean_bits
from flora_dist.core.state.spec import Geometry
from flora_dist.gradients.flow import Flow
from flora_dist.gradients.request import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientRow:
    """One parameter on this rank."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    how: str
    """Sketched how and where, or dense and why."""
    is_sketched: bool
    held_bytes: int
    """Of sketches between backward and step; 0 where dense: what the framework holds."""
    sent_bytes: int
    """Of sketches that this rank gives to a step's collectives; 0 where dense: the framework's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReport:
    """All parameters that train; ``str()`` is a table."""

    level: str
    rows: tuple[GradientRow, ...]

    @property
    def held_bytes(self) -> int:
        """Bytes of all accumulators on this rank."""
        return sum(row.held_bytes for row in self.rows)

    @property
    def sent_bytes(self) -> int:
        """Payload of this rank per step, however many micro-batches."""
        return sum(row.sent_bytes for row in self.rows)

    def __str__(self) -> str:
        table = [("parameter", "shape", "gradient", "held bytes", "sent bytes")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            table.append((row.name, shape, row.how, f"{row.held_bytes:,}", f"{row.sent_bytes:,}"))
        table.append(("all", "", self.level, f"{self.held_bytes:,}", f"{self.sent_bytes:,}"))
        return aligned(table, left=3)


def row_of(name: str, size: Geometry, flow: Flow | None, *, where: str, wire: Wire) -> GradientRow:
    """One parameter; ``flow`` is None where its gradient is dense."""
    if flow is None:
        return GradientRow(
            name=name,
            shape=size.shape,
            how=f"dense: {size.dense_because}",
            is_sketched=False,
            held_bytes=0,
            sent_bytes=0,
        )
    accumulator = flow.accumulator
    entry = accumulator.dtype.itemsize if accumulator.code is None else 1
    few = "" if accumulator.code is None else f" in {accumulator.code.bits} bits"
    return GradientRow(
        name=name,
        shape=size.shape,
        how=f"{where}, {accumulator.rank} per block of {accumulator.block}{few}",
        is_sketched=True,
        held_bytes=math.prod(accumulator.sums_shape) * entry,
        sent_bytes=_sent_bytes(flow, wire),
    )


def _sent_bytes(flow: Flow, wire: Wire) -> int:
    """What this rank gives to the collectives of one step: numbers, or records and their means."""
    own, route = flow.accumulator, flow.source.route
    if wire.bits is None:
        numbers = route.numbers_sent(block=own.block, rank=own.rank)
        return numbers * (wire.dtype or own.dtype).itemsize
    if not route.travels:
        return 0
    blocks = sum(tile.num_blocks(own.block) for tiles in route.kept for tile in tiles)
    sent = Code(bits=wire.bits, numbers=own.rank).bytes
    gathered = Code(bits=mean_bits(wire.bits), numbers=own.rank).bytes
    return blocks * (sent + (gathered if route.scatter is None else 0))
