# SPDX-License-Identifier: Apache-2.0
"""The search that tunes every rule of the sceptic's table by as many runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flora_dist.core.state.settings import MOMENTA
from tests.bench.quality_plan import (
    Row,
    Run,
    lr_of,
)
from tests.bench.quality_sceptic import CHANGES, sceptic_rows
from tests.bench.quality_sceptic import FULL as SCEPTICS
from tests.bench.quality_search import FINALISTS, best_run, expected_rounds, next_rounds, rules_of

SCEPTIC = {row.name: row for row in sceptic_rows()}
OF_THE_PAPER = {"blend", "flora", "flora_strict"}
"""Rules of the first table; the other momenta are tuned in this one."""


def test_every_rule_of_the_sceptics_table_has_as_many_changes_of_one_setting_as_adamw() -> None:
    for rule in rules_of(tuple(SCEPTIC.values())):
        centre = rule.centre
        assert len(rule.changes) == CHANGES
        for row in rule.changes:
            changed = {
                key
                for key in {*row.options, *centre.options}
                if row.options.get(key) != centre.options.get(key)
            }
            beside = (row.warmup != centre.warmup) + (row.max_norm != centre.max_norm)
            assert len(changed) + beside == 1, row.name
    ours = [row for row in SCEPTIC.values() if row.optimizer == "flora"]
    rules = {row.options.get("momentum", "blend") for row in ours}
    assert rules | OF_THE_PAPER | {"none"} == set(MOMENTA)


def losses_of_rounds(rows: list[Row], loss: dict[str, float]) -> tuple[list[list[Run]], Any]:
    """The rounds of a search in which runs of a row have this loss, least at exponent 2."""
    losses: dict[Run, float] = {}
    rounds = []
    while missing := next_rounds(rows, losses, SCEPTICS):
        rounds.append(missing)
        losses |= {run: loss[run.row] + 0.01 * abs(run.exponent - 2) for run in missing}
    return rounds, losses


def test_a_search_runs_every_round_for_all_rules_and_seeds_for_the_best_and_adamw() -> None:
    rules = rules_of(tuple(SCEPTIC.values()))[: FINALISTS + 2]
    rows = [row for rule in rules for row in (rule.centre, *rule.changes)]
    loss = {row.name: 3.0 - place for place, rule in enumerate(rules) for row in (rule.centre,)}
    loss |= {row.name: loss[row.family] + 0.5 for row in rows if row.name != row.family}
    winner = rules[-1].changes[2].name
    loss[winner] = loss[rules[-1].centre.name] - 0.5
    rounds, losses = losses_of_rounds(rows, loss)
    middle, outer, fine, changed, seeds = rounds
    for rule in rules:
        own = [[r.exponent for r in part if r.row == rule.centre.name] for part in rounds[:3]]
        assert own == [[0, 2], [-2, 4], [1, 3]]
        assert [r for r in changed if r.row == rule.changes[0].name] == [
            Run(rule.changes[0].name, 2, 0)
        ]
    assert len(middle) == len(outer) == len(fine) == 2 * len(rules)
    assert len(changed) == CHANGES * len(rules)
    # AdamW has the most to lose here, and its seeds all the same; the second worst has none.
    best = {best_run(rule, losses).row for rule in (rules[0], *rules[2:])}
    assert {(r.row, r.seed) for r in seeds} == {(row, seed) for row in best for seed in (1, 2)}
    assert winner in best
    assert len(losses) == expected_rounds(rows, SCEPTICS)


def test_a_search_goes_beyond_the_grid_where_its_best_is_at_an_end() -> None:
    rows, name = [SCEPTIC[n] for n in SCEPTIC if SCEPTIC[n].family == "AdamW"], "AdamW"
    losses = {Run(name, e, 0): float(e) for e in SCEPTICS.grid}
    assert [r.exponent for r in next_rounds(rows, losses, SCEPTICS)] == [-4, -3]
    losses = {Run(name, e, 0): float(-e) for e in SCEPTICS.grid}
    losses[Run(name, 4, 0)] = math.inf  # diverged
    assert [r.exponent for r in next_rounds(rows, losses, SCEPTICS)] == [1, 3]


def test_the_sceptics_learning_rates_are_a_factor_of_two_apart_and_then_of_its_root() -> None:
    row = SCEPTIC["AdamW"]
    rates = [lr_of(row, e, 0.02, SCEPTICS.factor) for e in SCEPTICS.grid]
    assert rates == pytest.approx([0.5e-3, 1e-3, 2e-3, 4e-3])
    assert lr_of(row, 1, 0.02, SCEPTICS.factor) == pytest.approx(1.414e-3, rel=1e-3)
