# SPDX-License-Identifier: Apache-2.0
"""Whether Flora pays here: the plan asked for against AdamW's, in words."""

from __future__ import annotations

from collections.abc import Sequence

from flora_dist.cluster.planner.plan import GIB, Plan

RIVALS = ("AdamW", "AdamW, 8-bit")
PAYS = 0.1
"""Of a rival's bytes: below, another optimizer is no reason to change a run."""


def verdict(plans: Sequence[Plan]) -> list[str]:
    """One or two sentences; the first plan is the one asked for, all others may be compared."""
    first, by_label = plans[0], {plan.label: plan for plan in plans}
    rivals = [by_label[label] for label in RIVALS]
    found = [f"{first.label}: {'; '.join(_against(first, rival) for rival in rivals)}."]
    if min(_saved(first, rival) for rival in rivals) >= PAYS:
        return found
    name, held = max(first.held.items(), key=lambda item: item[1].total)
    adamw = rivals[0]
    found.append(
        f"In memory Flora does not pay here: {name} are {held.total / first.total:.0%} of what a "
        f"rank holds, and AdamW's state is {adamw.held['state'].total / adamw.total:.0%} of its. "
        f"{_least(plans)}"
    )
    return found


def _saved(plan: Plan, rival: Plan) -> float:
    return 1 - plan.total / rival.total


def _against(plan: Plan, rival: Plan) -> str:
    word = "less" if plan.total <= rival.total else "more"
    size = abs(rival.total - plan.total) / GIB
    return f"{size:,.2f} GiB ({abs(_saved(plan, rival)):.0%}) {word} than {rival.label}"


def _least(plans: Sequence[Plan]) -> str:
    best = min((plan for plan in plans if plan.label.startswith("Flora")), key=lambda p: p.total)
    return f"The least that Flora holds: {best.label}, {best.total / GIB:,.2f} GiB."
