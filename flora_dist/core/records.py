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
DEFAULT_BITS = 4
"""Of "compressed" without further words, which keeps all numbers of a block: of what was measured,
the most bytes saved at the loss of dense gradients in up to 16 micro-batches; what rounding adds
grows slowly from there to 64 (docs/sketched_gradients.md)."""
SMALLEST_MEAN_BITS = 4
"""Of a mean: it is a sum of rounded numbers, to which one or two bits would add as much again."""


def gradient_bits(
    level: str, *, rank: int | None, bits: int | None, wire_bits: int | None, wire_dtype: str
) -> int:
    """Bits of each number that is kept of a gradient, where some of this is left out.

    >>> said = {"bits": None, "wire_bits": None, "wire_dtype": "float32"}
    >>> [gradient_bits("compressed", rank=rank, **said) for rank in (None, 16)]
    [4, 32]
    """
    if bits is not None:
        return bits
    says_nothing = rank is wire_bits is None and wire_dtype == "float32"
    return DEFAULT_BITS if level == "compressed" and says_nothing else FULL_BITS


def mean_bits(wire_bits: int) -> int:
    """Bits in which means are kept until the step, and gathered."""
    return max(wire_bits, SMALLEST_MEAN_BITS)


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
