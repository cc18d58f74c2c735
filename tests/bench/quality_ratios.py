# SPDX-License-Identifier: Apache-2.0
"""The picture of the second table: loss by the ratio of the gradient's sketches, rule by rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from tests.bench.quality_bytes import draw_bytes
from tests.bench.quality_compressed import RATIOS, RULES, gradient_ratio
from tests.bench.quality_plan import ADAMW, CENTRE
from tests.bench.quality_table import Line, figure_of, save

_DENSE = 1
_STYLES = ("k--", "r:", "b:")


def draw_compressed(found: Sequence[Line], folder: Path, title: str) -> None:
    """Both pictures of the table."""
    draw_ratios(found, folder, title)
    draw_bytes(found, folder, title)


def draw_ratios(found: Sequence[Line], folder: Path, title: str) -> None:
    """loss_by_ratio.png, complete or not at all."""
    figure = figure_of(8.0, 5.6, title)
    axes = figure.subplots()
    for rule in RULES:
        _rule(axes, rule, [line for line in found if line["mean"] is not None])
    level = [line for line in found if line["row"] == ADAMW or line["steps_per_batch"] > 1]
    for line, style in zip(level, _STYLES, strict=False):
        if line["mean"] is not None:
            axes.axhline(line["mean"], 0, 1, ls=style[1:], color=style[0], label=line["row"])
    ratios = sorted((_DENSE, *RATIOS))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, ["dense", *map(str, ratios[1:])])
    axes.set_xlabel("elements of a gradient per number that is kept")
    axes.set_ylabel("validation loss (nats/token), mean and range of the seeds")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    save(figure, folder / "loss_by_ratio.png")


def _rule(axes: Axes, rule: str, found: Sequence[Line]) -> None:
    chosen = {
        gradient_ratio(line["gradient_rank"]): line
        for line in found
        if line["options"] == CENTRE | {"momentum": rule}
        and line["steps_per_batch"] == 1
        and line["gradient_bits"] == 32
    }
    if chosen:
        ratios = sorted(chosen)
        axes.errorbar(
            ratios,
            [chosen[ratio]["mean"] for ratio in ratios],
            yerr=[chosen[ratio]["spread"] / 2 for ratio in ratios],
            fmt="o-",
            capsize=3,
            label=rule,
        )
