# SPDX-License-Identifier: Apache-2.0
"""How rules are tuned side by side: rounds of a coordinate search, equal for every rule.

    1  the rule's own settings at learning rates a factor of 2 apart, those in the middle first
    2  two more, a factor of 1.4 beside the best one (beyond it, where it is the last of them)
    3  at the best, each of the rule's changes of one setting, by itself
    4  the best of all that in other seeds, for the five best rules and the first of the table

Each round is run for all rules before the next begins: wherever it stops, rules have had the same
runs. A full product of the same settings would take ten times as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.quality_plan import Row, Run, Size, best_exponent, exponents_tried

FINALISTS = 5
"""Rules with other seeds, beside the one that all are held against."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule and its changes, each a row of one family."""

    centre: Row
    changes: tuple[Row, ...]


def rules_of(rows: Sequence[Row]) -> list[Rule]:
    """Families in their order; the row that is called as its family is the centre."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    return [
        Rule(
            centre=next(row for row in family if row.name == name),
            changes=tuple(row for row in family if row.name != name),
        )
        for name, family in families.items()
    ]


def next_rounds(rows: Sequence[Row], losses: Mapping[Run, float], size: Size) -> list[Run]:
    """Runs of the first round that is not complete; the first rule is what all are held against."""
    rules = rules_of(rows)
    for wanted in (_middle, _coarse, _fine, _changed):
        if missing := [run for r in rules for run in wanted(r, losses, size) if run not in losses]:
            return missing
    best = {rule.centre.family: best_run(rule, losses) for rule in rules}
    ranked = sorted(rules, key=lambda rule: _loss(best[rule.centre.family], losses))
    chosen = [rules[0], *(rule for rule in ranked if rule is not rules[0])][: FINALISTS + 1]
    others = [
        best[rule.centre.family]._replace(seed=s) for s in range(1, size.seeds) for rule in chosen
    ]
    return [run for run in others if run not in losses]


def best_run(rule: Rule, losses: Mapping[Run, float]) -> Run:
    """The run of the first seed that has learnt most, of all that there are of a rule.

    Raises:
        ValueError: there is none.
    """
    names = {row.name for row in (rule.centre, *rule.changes)}
    return min(
        (run for run in losses if run.row in names and run.seed == 0),
        key=lambda run: _loss(run, losses),
    )


def _loss(run: Run, losses: Mapping[Run, float]) -> float:
    value = losses[run]
    return value if math.isfinite(value) else math.inf


def _middle(rule: Rule, losses: Mapping[Run, float], size: Size) -> Iterator[Run]:
    del losses
    middle = size.grid[1:-1] or size.grid
    return (Run(rule.centre.name, exponent, 0) for exponent in middle)


def _coarse(rule: Rule, losses: Mapping[Run, float], size: Size) -> Iterator[Run]:
    del losses
    return (Run(rule.centre.name, exponent, 0) for exponent in size.grid)


def _fine(rule: Rule, losses: Mapping[Run, float], size: Size) -> Iterator[Run]:
    """Known once the first round is complete."""
    name = rule.centre.name
    first = {e: Run(name, e, 0) for e in size.grid}
    best = min(size.grid, key=lambda e: _loss(first[e], losses))
    beside = {size.grid[0]: (best - 2, best - 1), size.grid[-1]: (best + 1, best + 2)}
    return (Run(name, e, 0) for e in beside.get(best, (best - 1, best + 1)))


def _changed(rule: Rule, losses: Mapping[Run, float], size: Size) -> Iterator[Run]:
    del size
    best = best_exponent(rule.centre.name, losses)
    return (Run(row.name, best, 0) for row in rule.changes)


def is_at_an_end(rule: Rule, losses: Mapping[Run, float]) -> bool:
    """Whether the best learning rate is the last one that was tried."""
    name = rule.centre.name
    tried = exponents_tried(name, losses)
    return best_exponent(name, losses) in {tried[0], tried[-1]}


def expected_rounds(rows: Sequence[Row], size: Size) -> int:
    """How many runs all rounds take."""
    rules = rules_of(rows)
    chosen = min(len(rules), FINALISTS + 1)
    return len(rows) + len(rules) * (len(size.grid) + 1) + chosen * (size.seeds - 1)
