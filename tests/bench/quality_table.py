# SPDX-License-Identifier: Apache-2.0
"""What the quality bench leaves: one line per row, printed, and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.table import Table

from tests.bench.quality_plan import (
    ADAMW,
    CENTRE_NAME,
    CONTROL,
    NONE,
    Row,
    Run,
    Size,
    best_exponent,
    exponents_tried,
    next_runs,
)

Line = dict[str, Any]
"""One row of results.json."""
_COLUMNS = 4
WIDTH_OF_LABEL = 0.3
"""Decades of state bytes."""
HEIGHT_OF_LABEL = 0.009
"""Nats."""


def lines(
    rows: Sequence[Row],
    records: Mapping[Run, Mapping[str, Any]],
    losses: Mapping[Run, float],
    size: Size,
) -> list[Line]:
    """One line per row whose runs are all there."""
    finished = [_line(row, records, losses, size) for row in rows if _is_done(row, losses, size)]
    by_name = {line["row"]: line for line in finished}
    for row in rows:
        if row.name not in by_name:
            continue
        line = by_name[row.name]
        for key, other in (
            ("minus_none", NONE),
            ("minus_control", CONTROL),
            ("minus_adamw", ADAMW),
            ("minus_dense", dense_twin(row, rows)),
        ):
            line[key] = _differences(line, by_name.get(other))
    return finished


def dense_twin(row: Row, rows: Sequence[Row]) -> str | None:
    """The row that differs from this one in nothing but that its gradients are dense."""
    if row.gradient_rank is None:
        return None
    dense = {"gradient_rank": None, "gradient_bits": 32, "micro_batches": 1}
    changes = {"name": "", "factor": "", **dense}
    twins = (r.name for r in rows if replace(row, **changes) == replace(r, name="", factor=""))
    return next(twins, None)


def _is_done(row: Row, losses: Mapping[Run, float], size: Size) -> bool:
    return not next_runs([row], losses, size)


def _line(
    row: Row,
    records: Mapping[Run, Mapping[str, Any]],
    losses: Mapping[Run, float],
    size: Size,
) -> Line:
    tried, best = exponents_tried(row.name, losses), best_exponent(row.name, losses)
    chosen = [Run(row.name, best, seed) for seed in range(size.seeds)]
    seeds = [records[run]["validation_loss"] for run in chosen]
    whole = None not in seeds
    first = records[chosen[0]]
    by_lr = [records[Run(row.name, exponent, 0)] for exponent in tried]
    return {
        "row": row.name,
        "factor": row.factor,
        "optimizer": row.optimizer,
        "options": dict(row.options),
        "gradient_rank": row.gradient_rank,
        "gradient_bits": row.gradient_bits,
        "micro_batches": row.micro_batches,
        "steps_per_batch": row.steps_per_batch,
        "precision": row.precision,
        "gradient_bytes": first["gradient_bytes"],
        "state_bytes": first["state_bytes"],
        "share_of_adamw": first["state_bytes"] / first["adamw_bytes"],
        "compressed_share": first["compressed_share"],
        "lr": first["lr"],
        "lr_at_end_of_grid": best in {tried[0], tried[-1]},
        "by_lr": [[record["lr"], record["validation_loss"]] for record in by_lr],
        "seeds": seeds,
        "mean": statistics.fmean(seeds) if whole else None,
        "spread": max(seeds) - min(seeds) if whole else None,
        "tokens_per_second": first["tokens_per_second"],
        "curve": first["curve"],
    }


def _differences(line: Line, other: Line | None) -> list[float] | None:
    """Seed by seed: runs of one seed share weights at the start, and batches."""
    if other is None or line["mean"] is None or other["mean"] is None:
        return None
    return [ours - theirs for ours, theirs in zip(line["seeds"], other["seeds"], strict=True)]


def table(found: Sequence[Line], title: str) -> Table:
    """The lines for a terminal, in their order; without the differences that no line has."""
    shown = Table(title=title, caption="* best at the end of the learning rates tried")
    keys = ("minus_none", "minus_control", "minus_adamw", "minus_dense")
    differences = [key for key in keys if any(line[key] is not None for line in found)]
    shown.add_column("row")
    for name in ("gradient", "state bytes", "of AdamW", "lr", "validation", "spread"):
        shown.add_column(name, justify="right")
    for key in differences:
        shown.add_column(key.replace("minus_", "- "), justify="right")
    for line in found:
        shown.add_row(
            line["row"],
            f"{line['gradient_bytes']:,}",
            f"{line['state_bytes']:,}",
            f"{line['share_of_adamw']:.3f}",
            f"{line['lr']:.3g}" + "*" * line["lr_at_end_of_grid"],
            _number(line["mean"], ".4f"),
            _number(line["spread"], ".4f"),
            *(_mean(line[key]) for key in differences),
        )
    return shown


def _number(value: float | None, form: str) -> str:
    return "diverged" if value is None else format(value, form)


def _mean(values: list[float] | None) -> str:
    return "" if values is None else format(statistics.fmean(values), "+.4f")


def draw_optimizers(found: Sequence[Line], folder: Path, title: str) -> None:
    """loss_by_tokens.png and loss_by_state.png, each complete or not at all."""
    save(_by_tokens(found, title), folder / "loss_by_tokens.png")
    save(_by_state(found, title), folder / "loss_by_state.png")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, complete or not at all."""
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial)
    partial.replace(path)


def figure_of(width: float, height: float, title: str) -> Figure:
    """An empty one."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global state of pyplot
    figure.suptitle(title)
    return figure


def _by_tokens(found: Sequence[Line], title: str) -> Figure:
    """A panel for each factor; AdamW and the centre are in all of them."""
    factors = list(dict.fromkeys(line["factor"] for line in found))
    rows = max(1, -(-len(factors) // _COLUMNS))
    across = max(1, min(_COLUMNS, len(factors)))
    figure = figure_of(4.6 * across, 3.8 * rows, title)
    panels = figure.subplots(rows, across, squeeze=False).flat
    for panel, factor in zip(panels, factors, strict=False):
        for line in found:
            is_reference = line["row"] in {ADAMW, CENTRE_NAME}
            if line["factor"] == factor:
                _curve(panel, line, style="-")
            elif is_reference:
                style = "k--" if line["row"] == ADAMW else "k:"
                _curve(panel, line, style=style)
        panel.set_title(factor)
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_ylabel("validation loss (nats/token)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6)
    for panel in list(panels):
        panel.set_axis_off()
    return figure


def _curve(panel: Axes, line: Line, *, style: str) -> None:
    points = [point for point in line["curve"] if point[1] is not None]
    if points:
        panel.plot(*zip(*points, strict=True), style, label=line["row"], linewidth=1.2)


def _by_state(found: Sequence[Line], title: str) -> Figure:
    figure = figure_of(10.0, 7.0, title)
    axes = figure.subplots()
    factors = list(dict.fromkeys(line["factor"] for line in found))
    labelled: list[tuple[float, float]] = []
    for number, factor in enumerate(factors):
        chosen = [line for line in found if line["factor"] == factor and line["mean"] is not None]
        if not chosen:
            continue
        axes.errorbar(
            [line["state_bytes"] for line in chosen],
            [line["mean"] for line in chosen],
            yerr=[line["spread"] / 2 for line in chosen],
            fmt="o",
            color=colormaps["tab20"](number),
            capsize=3,
            label=factor,
        )
        for line in chosen:
            place = (line["state_bytes"], line["mean"])
            if not _is_taken(place, labelled):
                labelled.append(place)
                axes.annotate(
                    line["row"], place, (4, 3), textcoords="offset points", fontsize=7, color="0.3"
                )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("optimizer state (bytes)")
    axes.set_ylabel("validation loss (nats/token), mean and range of the seeds")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    return figure


def _is_taken(place: tuple[float, float], labelled: Iterable[tuple[float, float]]) -> bool:
    """Whether a label would lie on another one; the rows that tell most come first."""
    return any(
        abs(math.log10(place[0] / x)) < WIDTH_OF_LABEL and abs(place[1] - y) < HEIGHT_OF_LABEL
        for x, y in labelled
    )
