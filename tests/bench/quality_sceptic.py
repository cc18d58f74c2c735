# SPDX-License-Identifier: Apache-2.0
"""The sceptic's table: each rule is tuned by as many runs as AdamW, over what it has to tune.

    python -m tests.bench.quality --table sceptic --size small

The plan is a coordinate search (`quality_search.py`): learning rates first, then five changes of
one setting each, three of which are the same for everyone, then other seeds. Gradients are clipped
at a norm of 1 but for one of the changes.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flora_dist.core.state.presets import APOLLO, RACS, SCALE
from tests.bench.quality_plan import Row, Run, Size, exponents_tried
from tests.bench.quality_search import Rule, best_run, is_at_an_end, rules_of

FULL = Size(
    steps=400,
    layers=None,
    grid=(-2, 0, 2, 4),
    factor=2.0**0.5,
    extensions=0,
    seeds=3,
    evaluations=4,
)
"""0.5e-3 to 4e-3, and a factor of 1.4 around the best: up to 8e-3."""
QUICK = Size(
    steps=120,
    layers=None,
    grid=(0, 2),
    factor=2.0**0.5,
    extensions=0,
    seeds=1,
    sequences=128,
)
LATE = 0.2
"""Part of the steps that a long warm-up takes."""
CHANGES = 5
Change = Mapping[str, Any]
SHARP: Change = {"orthogonalise": None}
"""Of the ends of a model, as in Muon."""
TILES: Change = {"orthogonalise": 64, "roles": {"head": SHARP, "embedding": SHARP}}
MUON: Change = {"betas": (0.9, 0.95), "momentum": 0.95, "weight_decay": 0.0}


def sceptic_rows() -> tuple[Row, ...]:
    """Every rule and its changes, the most telling first."""
    return (
        *_rule(
            "AdamW",
            "adamw",
            {"betas": (0.9, 0.95)},
            {"betas": (0.9, 0.99)},
            {"betas": (0.9, 0.999)},
        ),
        *_flora("default", {}, {"beta2": 0.95}, {"beta1": 0.95}),
        *_flora("default in 8 bits", {"state_bits": 8}, {"beta2": 0.95}, {"beta1": 0.95}),
        *_flora(
            "default, lr relative",
            {"scale_parameter": "relative"},
            {"beta2": 0.95},
            {"state_bits": 8},
        ),
        *_flora(
            "orthogonal tiles",
            TILES,
            {"beta2": 0.95},
            {"beta1": 0.95},
        ),
        *_flora("tiles, rank 4", TILES | {"rank": 4}, {"beta2": 0.95}, {"beta1": 0.95}),
        *_flora("tiles, vectors", TILES | {"momentum": "vectors"}, {"beta2": 0.95}, {"clip": 2.0}),
        *_rule("Muon (torch)", "muon", MUON, {"momentum": 0.9}, {"betas": (0.9, 0.99)}),
        *_flora(
            "ademamix",
            {"momentum": "ademamix", "beta1": 0.99},
            {"beta1": 0.9},
            {"blend_gain": 4.0},
        ),
        *_flora("APOLLO", APOLLO, {"beta2": 0.95}, {"growth": 1.1}),
        *_flora(
            "subspace Adam",
            {"momentum": "subspace_adam"},
            {"blend_gain": 2.5},
            {"beta2": 0.99},
        ),
        *_flora("SCALE", SCALE, {"beta1": 0.95}, {"clip": 1.0}),
        *_flora("vectors", {"momentum": "vectors"}, {"beta2": 0.95}, {"clip": 2.0}),
        *_rule("Adafactor (torch)", "adafactor", {}, {"beta2_decay": -0.5}, {"d": 2.0}),
        *_flora("none", {"momentum": "none"}, {"beta2": 0.95}, {"clip": 2.0}),
        *_flora(
            "RACS",
            RACS,
            {"growth": 1.1},
            {"roles": {"head": {"momentum": "blend", "rank": None}}},
        ),
        *_flora(
            "near RACS",
            {"momentum": "vectors", "beta2": 0.9, "growth": 1.01},
            {"growth": 1.1},
            {"roles": {"head": {"momentum": "blend", "rank": None}}},
        ),
        *_flora(
            "blend, rank 8, gain 2", {"rank": 8, "blend_gain": 2.0}, {"beta2": 0.95}, {"beta1": 0.8}
        ),
        *_lion(),
    )


def tile_rows() -> tuple[Row, ...]:
    """Tiles among the rules of the first table, whose gradients are not clipped."""
    small: Change = {"weight_decay": 0.0, "rank": 4, **TILES}
    return (
        Row(name="blend, rank 4, tiles of 64", factor="tiles", optimizer="flora", options=small),
    )


def _lion() -> Iterator[Row]:
    """Where the package lion-pytorch is installed; torch has none."""
    if importlib.util.find_spec("lion_pytorch") is not None:
        centre = {"betas": (0.9, 0.99)}
        yield from _rule("Lion", "lion", centre, {"betas": (0.95, 0.98)}, {"betas": (0.9, 0.95)})


def _flora(rule: str, options: Change, *changes: Change) -> Iterator[Row]:
    yield from _rule(rule, "flora", options, *changes)


def _rule(rule: str, optimizer: str, options: Change, *changes: Change) -> Iterator[Row]:
    """The centre, weight decay, a long warm-up, no clipping, and what a rule has of its own."""
    centre = {"weight_decay": 0.0, **options}
    common = {"factor": rule, "family": rule, "optimizer": optimizer}
    named: dict[str, Change] = {rule: {}}
    named |= {f"{rule}, {_shown(change)}": change for change in changes}
    named |= {f"{rule}, weight decay 0.1": {"weight_decay": 0.1}}
    for name, change in named.items():
        yield Row(name=name, options={**centre, **change}, max_norm=1.0, **common)
    late = f"{rule}, warm-up {LATE:g}"
    yield Row(name=late, options=centre, warmup=LATE, max_norm=1.0, **common)
    yield Row(name=f"{rule}, gradients not clipped", options=centre, **common)


def _shown(change: Change) -> str:
    ((name, value),) = change.items()
    return f"{name} {'head' if name == 'roles' else value}"


def sceptic_lines(
    rows: Sequence[Row],
    records: Mapping[Run, Mapping[str, Any]],
    losses: Mapping[Run, float],
    size: Size,
) -> list[dict[str, Any]]:
    """One line for each rule that has a run, the least loss of the first seed first."""
    rules = [rule for rule in rules_of(rows) if _runs(rule, losses)]
    found = [_line(rule, records, losses, size) for rule in rules]
    return sorted(found, key=lambda line: (line["loss"] is None, line["loss"]))


def _runs(rule: Rule, losses: Mapping[Run, float]) -> list[Run]:
    names = {row.name for row in (rule.centre, *rule.changes)}
    return [run for run in losses if run.row in names]


def _line(
    rule: Rule, records: Mapping[Run, Mapping[str, Any]], losses: Mapping[Run, float], size: Size
) -> dict[str, Any]:
    best, own = best_run(rule, losses), records[best_run(rule, losses)]
    seeds = [
        records[r]["validation_loss"]
        for s in range(size.seeds)
        if (r := best._replace(seed=s)) in records
    ]
    whole = None not in seeds and len(seeds) > 1
    tried = [Run(rule.centre.name, e, 0) for e in exponents_tried(rule.centre.name, losses)]
    return {
        "row": rule.centre.family,
        "best": best.row,
        "lr": own["lr"],
        "lr_at_end_of_grid": is_at_an_end(rule, losses),
        "loss": own["validation_loss"],
        "runs": len(_runs(rule, losses)),
        "seeds": seeds,
        "mean": statistics.fmean(seeds) if whole else None,
        "spread": max(seeds) - min(seeds) if whole else None,
        "state_bytes": own["state_bytes"],
        "share_of_adamw": own["state_bytes"] / own["adamw_bytes"],
        "tokens_per_second": own["tokens_per_second"],
        "by_lr": [[records[run]["lr"], records[run]["validation_loss"]] for run in tried],
        "by_change": {
            run.row: records[run]["validation_loss"]
            for row in rule.changes
            for run in losses
            if run.row == row.name and run.seed == 0
        },
    }


def sceptic_table(found: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The lines for a terminal."""
    shown = Table(title=title, caption="* best at the end of the learning rates tried")
    for name in (
        "rule, at its best",
        "state bytes",
        "of AdamW",
        "lr",
        "runs",
        "seed 0",
        "seeds",
        "mean",
        "spread",
    ):
        shown.add_column(name, justify="left" if not shown.columns else "right")
    for line in found:
        shown.add_row(
            line["best"],
            f"{line['state_bytes']:,}",
            f"{line['share_of_adamw']:.3f}",
            f"{line['lr']:.3g}" + "*" * line["lr_at_end_of_grid"],
            str(line["runs"]),
            _number(line["loss"]),
            str(len(line["seeds"])),
            _number(line["mean"]),
            _number(line["spread"]),
        )
    return shown


def _number(value: float | None) -> str:
    return "" if value is None else format(value, ".4f")


def draw_nothing(found: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """The table says it all."""
    del found, folder, title
