# SPDX-License-Identifier: Apache-2.0
"""An estimate: what one method needs of each rank and of the network, in exact integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flora_dist.cluster.planner.memory import CategoryBytes, host_bytes, memory
from flora_dist.cluster.planner.methods import Method
from flora_dist.cluster.planner.request import Request
from flora_dist.cluster.planner.wire import link_bytes, payloads, sent_bytes

GIB = 2**30
BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One method on one cluster."""

    label: str
    backend: str
    held: Mapping[str, CategoryBytes]
    """Bytes of the fullest rank by category, in the order of ``CATEGORIES``."""
    wire: Mapping[str, int]
    """Bytes that a rank sends per optimizer step, by purpose."""
    link: int
    """Bytes per step that the busiest link carries one way."""
    host: int = 0
    """Bytes of a rank that rest in the host's memory, not in ``held``."""

    @property
    def total(self) -> int:
        """Bytes of a rank if every category were at its most at once."""
        return sum(held.total for held in self.held.values())

    @property
    def tables(self) -> int:
        """Of them, of embeddings and head."""
        return sum(held.tables for held in self.held.values())

    @property
    def sent(self) -> int:
        """Bytes that a rank sends per step."""
        return sum(self.wire.values())

    def seconds(self, gigabits: float) -> float:
        """A step's time on the busiest link, if nothing hides it; ``gigabits`` per second."""
        return self.link * BITS / (gigabits * 1e9)

    def as_json(self, gigabits: float) -> dict[str, Any]:
        """What ``--json`` prints: bytes are exact integers."""
        return {
            "method": self.label,
            "backend": self.backend,
            "bytes_per_rank": {name: held.total for name, held in self.held.items()},
            "bytes_of_embeddings_and_head": {
                name: held.tables for name, held in self.held.items() if held.tables
            },
            "total_bytes": self.total,
            "wire_bytes_per_step": {**self.wire, "total": self.sent},
            **({"host_bytes_per_rank": self.host} if self.host else {}),
            "link_bytes_per_step": self.link,
            "link_seconds_per_step": self.seconds(gigabits),
        }


def estimate(request: Request, method: Method) -> Estimate:
    """Add up what a method needs."""
    found = payloads(request, method)
    wire: dict[str, int] = {}
    for payload in found:
        wire[payload.purpose] = wire.get(payload.purpose, 0) + sent_bytes([payload])
    return Estimate(
        label=method.label,
        backend=method.backend.name,
        held=memory(request, method),
        wire=wire,
        link=link_bytes(request, found),
        host=host_bytes(request, method),
    )
