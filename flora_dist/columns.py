# SPDX-License-Identifier: Apache-2.0
"""Tables for people, in columns of equal width."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """The first ``left`` columns flush left, the others flush right.

    >>> print(aligned([("a", "bcd", "1"), ("fg", "h", "10")], left=2))
    a   bcd   1
    fg  h    10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
