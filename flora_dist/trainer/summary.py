# SPDX-License-Identifier: Apache-2.0
"""What a run leaves at its end: a table, summary.json and a picture, AdamW's numbers beside."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_dist.trainer.config import DENSE
from flora_dist.trainer.loop import RunResult
from flora_dist.trainer.optimizers import LABELS
from flora_dist.trainer.optional_imports import needs_train_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

RESULTS = "summary.json"
"""What a run has measured, in its folder."""
_NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The run under test and, where it was run, AdamW."""

    run: str
    """Name of the run."""
    optimizer: str
    """The optimizer under test, as in the config."""
    lr: float
    """Its learning rate."""
    adamw_lr: float | None
    """AdamW's; None if it was not run."""
    parameters: int
    """Weights of the model; tied ones count once."""
    world_size: int
    """Number of processes."""
    measured: RunResult
    """The optimizer under test."""
    adamw: RunResult | None
    """AdamW on the same data, steps and seed; None if it was not run."""

    @property
    def label(self) -> str:
        """The optimizer's name as people write it."""
        return LABELS[self.optimizer]


def summary_table(summary: Summary) -> Table:
    """One row per measurement, one column per optimizer."""
    with needs_train_extra():
        from rich.table import Table
    table = Table(title=f"{summary.run}: {summary.parameters:,} parameters")
    table.add_column(f"{summary.world_size} process{'es' * (summary.world_size > 1)}")
    table.add_column(f"{summary.label}, lr {summary.lr:g}", justify="right")
    ours, other = _column(summary.measured), None
    if summary.optimizer != "adamw":
        its = "" if summary.adamw_lr is None else f", lr {summary.adamw_lr:g}"
        table.add_column(f"AdamW{its}", justify="right")
        other = _column(summary.adamw) if summary.adamw else _computed(summary.measured)
    for row, value in ours.items():
        table.add_row(row, value, *([other[row]] if other else []))
    return table


def _column(measured: RunResult) -> dict[str, str]:
    return {
        "steps": f"{measured.steps:,}" + ("" if measured.finished else " (stopped)"),
        "training loss (nats/token)": _shown(measured.loss, ".4f"),
        "validation loss (nats/token)": _shown(measured.validation_loss, ".4f"),
        "tokens/s": _shown(measured.tokens_per_second, ",.0f"),
        "peak memory (bytes/process)": _shown(measured.peak_memory_bytes, ",d"),
        "optimizer state (bytes/process)": _shown(measured.state_bytes, ",d"),
        **_sketches(measured),
        "sent (bytes/step/process)": _shown(measured.bytes_sent, ",d"),
    }


def _sketches(measured: RunResult) -> dict[str, str]:
    gradients = measured.gradients
    level, held = (DENSE, None) if gradients is None else (gradients.level, gradients.held_bytes)
    return {"gradients": level, "sketches of them (bytes/process)": _shown(held, ",d")}


def _computed(measured: RunResult) -> dict[str, str]:
    """AdamW's column without a run: two float32 moments per weight are certain, the rest is not."""
    column = dict.fromkeys(_column(measured), _NOT_RUN)
    column["optimizer state (bytes/process)"] = f"{measured.adamw_bytes:,d} (computed)"
    return column


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_summary(summary: Summary, folder: Path) -> None:
    """Write summary.json and summary.png, each complete or not at all."""
    tree: dict[str, Any] = asdict(summary)
    for part in (tree["measured"], tree["adamw"]):
        if part is not None:
            del part["records"]  # they are metrics.jsonl
    partial = folder / ".summary.json.partial"
    partial.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RESULTS)
    _draw(summary, folder)


def _draw(summary: Summary, folder: Path) -> None:
    with needs_train_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(15.5, 4.5), dpi=120)
    FigureCanvasAgg(figure)  # no display, no global state of pyplot
    # A layout that is found by drawing would take as long as the picture itself.
    margins = {"left": 0.045, "right": 0.985, "bottom": 0.12, "top": 0.89, "wspace": 0.18}
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 2, 1.3), gridspec_kw=margins)
    figure.suptitle(
        f"{summary.run}: {summary.parameters:,} parameters, {summary.world_size} process"
        f"{'es' * (summary.world_size > 1)}"
    )
    _draw_losses(left, summary, "step")
    _draw_losses(middle, summary, "seconds")
    _draw_memory(right, summary)
    partial = folder / ".summary.partial.png"
    figure.savefig(partial)
    partial.replace(folder / "summary.png")


def _draw_losses(axes: Axes, summary: Summary, against: str) -> None:
    """Against a number of the records: `step` or `seconds`."""
    runs = [(f"{summary.label}, lr {summary.lr:g}", summary.measured, "C0")]
    if summary.adamw is not None:
        runs.append((f"AdamW, lr {summary.adamw_lr:g}", summary.adamw, "C1"))
    for label, measured, colour in runs:
        for key, style, what in (
            ("loss", "-", "training"),
            ("validation_loss", "o--", "validation"),
        ):
            points = [
                (r[against], r[key])
                for r in measured.records
                if r.get(key) is not None and r.get(against) is not None
            ]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, style, color=colour, label=f"{label}, {what}", alpha=0.8)
    axes.set_xlabel(against)
    axes.set_ylabel("loss (nats/token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()


def _draw_memory(axes: Axes, summary: Summary) -> None:
    mebibyte = 2.0**20
    bars = [(summary.label, summary.measured.weight_bytes, summary.measured.state_bytes)]
    if summary.optimizer != "adamw":
        measured = summary.adamw
        state = measured.state_bytes if measured else summary.measured.adamw_bytes
        label = "AdamW" if measured else "AdamW (computed)"
        bars.append((label, summary.measured.weight_bytes, state))
    labels = [bar[0] for bar in bars]
    weights = [bar[1] / mebibyte for bar in bars]
    states = [bar[2] / mebibyte for bar in bars]
    below = axes.bar(labels, weights, color="0.75")
    sizes = [f"weights\n{size:.2f} MiB" for size in weights]
    axes.bar_label(below, sizes, label_type="center", fontsize=9)
    drawn = axes.bar(labels, states, bottom=weights, color=["C0", "C1"][: len(bars)])
    measured_runs = [summary.measured, summary.adamw]
    peaks = [run.peak_memory_bytes / mebibyte for run in measured_runs[: len(bars)] if run]
    tops = [f"state {state:.2f} MiB" for state in states]
    for place, peak in enumerate(peaks):
        tops[place] += f"\npeak {peak:,.0f} MiB"
    axes.bar_label(drawn, tops, fontsize=9)
    axes.margins(y=0.2)
    axes.set_ylabel("MiB per process; peak: of all it had")
