# SPDX-License-Identifier: Apache-2.0
"""What a fault on a checkpoint has led to, and many of them as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REFUSED = "refused"
LOADED = "loaded, as saved last"
WARNED = "loaded, as saved before, with a warning"
GOOD = (REFUSED, LOADED, WARNED)
# What must never happen.
WRONG = "WRONG STATE LOADED"
LOST = "PREVIOUS ONE LOST"
TOUCHED = "RUNNING STATE TOUCHED"
NAMELESS = "REFUSED WITHOUT THE FILE'S NAME"
OTHER = "ANOTHER ERROR"
BAD = (WRONG, LOST, TOUCHED, NAMELESS, OTHER)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a fault has led to."""

    kind: str
    what: str
    found: str
    """One of ``GOOD`` or ``BAD``."""
    detail: str = ""


def table(verdicts: Sequence[Verdict]) -> str:
    """Kinds of faults by what they led to."""
    kinds = list(dict.fromkeys(verdict.kind for verdict in verdicts))
    rows = [["fault", "count", *GOOD, *BAD]]
    for kind in (*kinds, "all"):
        mine = [v for v in verdicts if kind in (v.kind, "all")]
        rows.append(
            [
                kind,
                str(len(mine)),
                *(str(sum(v.found == found for v in mine)) for found in (*GOOD, *BAD)),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
