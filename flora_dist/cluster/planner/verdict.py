# SPDX-License-Identifier: Apache-2.0
"""Whether Flora pays here: the estimate asked for against AdamW's, in words."""

from __future__ import annotations

from collections.abc import Sequence

from flora_dist.cluster.planner.estimate import GIB, Estimate

RIVALS = ("AdamW", "AdamW, 8-bit")
PAYS = 0.1
"""Of a rival's bytes: below, another optimizer is no reason to change a run."""


def verdict(estimates: Sequence[Estimate]) -> list[str]:
    """One or two sentences; the first estimate is the one asked for, all others may be compared."""
    first, by_label = estimates[0], {each.label: each for each in estimates}
    rivals = [by_label[label] for label in RIVALS]
    found = [f"{first.label}: {'; '.join(_against(first, rival) for rival in rivals)}."]
    if min(_saved(first, rival) for rival in rivals) >= PAYS:
        return found
    name, held = max(first.held.items(), key=lambda item: item[1].total)
    adamw = rivals[0]
    found.append(
        f"In memory Flora does not pay here: {name} are {held.total / first.total:.0%} of what a "
        f"rank holds, and AdamW's state is {adamw.held['state'].total / adamw.total:.0%} of its. "
        f"{_least(estimates)}"
    )
    return found


def _saved(estimate: Estimate, rival: Estimate) -> float:
    return 1 - estimate.total / rival.total


def _against(estimate: Estimate, rival: Estimate) -> str:
    word = "less" if estimate.total <= rival.total else "more"
    size = abs(rival.total - estimate.total) / GIB
    return f"{size:,.2f} GiB ({abs(_saved(estimate, rival)):.0%}) {word} than {rival.label}"


def _least(estimates: Sequence[Estimate]) -> str:
    ours = (each for each in estimates if each.label.startswith("Flora"))
    best = min(ours, key=lambda each: each.total)
    return f"The least that Flora holds: {best.label}, {best.total / GIB:,.2f} GiB."
