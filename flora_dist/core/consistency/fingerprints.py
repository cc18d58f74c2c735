# SPDX-License-Identifier: Apache-2.0
"""Numbers that stand for the bits of tensors, made where the tensors are.

Shape suffix: S numbers in a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ELEMENTS = 65536
WIDTH = 62
"""Bits of a fingerprint."""
# The multipliers of splitmix64, as int64.
_GOLDEN, _MIX = -7046029254386353131, -4658895280553007687
# Halves of 64 bits: of a whole one the sign, 2^63 times anything odd, would be the same everywhere,
# and two of them nothing.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
Sample = Mapping[str, Tensor]
"""Consecutive elements of some tensors of one parameter, by what they are; empty if not held."""


def chunk(tensor: Tensor, turn: int) -> Tensor:
    """At most ``MOST_ELEMENTS`` consecutive elements, at another place another time."""
    count = max(1, -(-tensor.numel() // MOST_ELEMENTS))
    start = draw(turn, "chunk") % count * MOST_ELEMENTS
    return tensor.detach().reshape(-1)[start : start + MOST_ELEMENTS]


def draw(turn: int, purpose: str) -> int:
    """A number that depends on the step alone, hashed so that checks at every 2nd step vary too."""
    return int.from_bytes(hashlib.sha256(f"{turn} {purpose}".encode()).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class _Constants:
    """Odd constants of the places in a line, on each device."""

    lines: dict[torch.device, Tensor]

    def on(self, device: torch.device) -> Tensor:
        if device not in self.lines:
            places_S = torch.arange(1, 2 * MOST_ELEMENTS + 1, device=device) * _GOLDEN
            self.lines[device] = (places_S ^ (places_S >> 29)) * _MIX | 1
        return self.lines[device]


def fingerprint_of(tensor: Tensor, places: _Constants) -> Tensor:
    """Sum (), modulo 2^64, of an element's bits times the constant of its place.

    One changed element always changes it, and sums of integers have no order.
    """
    bits_S = tensor.contiguous().view(_INTEGERS[tensor.element_size()]).long()
    return (bits_S * places.on(tensor.device)[: bits_S.numel()]).sum()


def numbers_of(samples: Sequence[tuple[str, Sample]]) -> dict[str, dict[str, int]]:
    """Fingerprints of each tensor alone."""
    places, found = _Constants({}), dict[str, dict[str, int]]()
    for name, sample in samples:
        numbers = {k: int(fingerprint_of(tensor, places).item()) for k, tensor in sample.items()}
        found.setdefault(name, {}).update(numbers)
    return found


def fingerprints(samples: Sequence[Sample]) -> Tensor:
    """One number (S,) for each sample, of 62 bits."""
    places = _Constants({})
    totals: list[Tensor] = []
    for sample in samples:
        total: Tensor | int = 0
        for tensor in sample.values():
            total = total * _GOLDEN + fingerprint_of(tensor, places)
        assert isinstance(total, Tensor)
        totals.append(total.to(totals[0].device) if totals else total)
    if not totals:
        return torch.zeros(0, dtype=torch.int64)
    sums_S = torch.stack(totals)
    # Mix the highest bits into those that stay.
    sums_S = (sums_S ^ (sums_S >> 31)) * _MIX
    return (sums_S ^ (sums_S >> 31)) & ((1 << WIDTH) - 1)
