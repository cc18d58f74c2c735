# SPDX-License-Identifier: Apache-2.0
"""How many bytes the numbers of one block take in few bits. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

FULL_BITS = 32
"""Stand for the arithmetic's dtype, float64 too."""
FEW_BITS = (8, 4, 2, 1)
"""Bits per number that need a scale."""
SCALE_BYTES = 2
"""Of a block's scale, a bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """How the numbers of one block are written: a record of bytes, see `core/sketch/quantise.py`.

    >>> [Code(bits=b, numbers=n).bytes for b, n in ((4, 64), (1, 9), (16, 8))]
    [34, 4, 16]
    """

    bits: int
    """Of each number: 16 (bfloat16, no scale), 8, 4, 2 or 1."""
    numbers: int
    """Of a block: the rank of its sketch."""

    @property
    def bytes(self) -> int:
        """Of a record, with its scale."""
        scale = SCALE_BYTES if self.bits in FEW_BITS else 0
        return -(-self.numbers * self.bits // 8) + scale
