# SPDX-License-Identifier: Apache-2.0
"""The picture of gradients in few bits: loss by the bytes that are kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from tests.bench.quality_plan import ADAMW, CENTRE
from tests.bench.quality_table import Line, figure_of, save

_BLOCK: int = CENTRE["block"]
_RULES = ("blend", "none")
_MARKS = {1: "o-", 8: "s--", 16: "d:"}
"""By micro-batches of a step."""


def draw_bytes(found: Sequence[Line], folder: Path, title: str) -> None:
    """loss_by_bytes.png, complete or not at all: what is kept is what is sent, once per step."""
    figure = figure_of(8.0, 5.6, title)
    axes = figure.subplots()
    complete = [line for line in found if line["mean"] is not None]
    dense = max((line["gradient_bytes"] for line in complete), default=1)
    for rule in _RULES:
        for micro_batches, marks in _MARKS.items():
            _all_numbers(axes, list(_of(complete, rule, micro_batches)), dense, marks)
        _fewer_numbers(axes, list(_of(complete, rule, 1)), dense)
    for line in complete:
        if line["row"] == ADAMW:
            axes.axhline(line["mean"], 0, 1, ls="--", color="k", label=line["row"])
    axes.set_xscale("log", base=2)
    ticks = (1, 8, 16, 32)
    axes.set_xticks([1 / each for each in ticks], ["fp32", *(f"1/{each}" for each in ticks[1:])])
    axes.set_xlabel("bytes kept of a gradient, and sent per step")
    axes.set_ylabel("validation loss (nats/token), mean and range of the seeds")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    save(figure, folder / "loss_by_bytes.png")


def _of(found: Sequence[Line], rule: str, micro_batches: int) -> Iterator[Line]:
    for line in found:
        is_dense = line["gradient_rank"] is None
        if (
            line["options"] == CENTRE | {"momentum": rule}
            and line["steps_per_batch"] == 1
            and (line["gradient_bits"] < 32 or is_dense)
            and (line["micro_batches"] == micro_batches or is_dense)
        ):
            yield line


def _all_numbers(axes: Axes, found: Sequence[Line], dense: int, marks: str) -> None:
    chosen = [line for line in found if line["gradient_rank"] in {None, _BLOCK}]
    few = [line for line in chosen if line["gradient_rank"] is not None]
    if not few:
        return
    several = few[0]["micro_batches"]
    after = "" if several == 1 else f", {several} micro-batches"
    label = f"{few[0]['options']['momentum']}, all numbers in few bits{after}"
    _errors(axes, chosen, dense, fmt=marks, label=label)


def _fewer_numbers(axes: Axes, found: Sequence[Line], dense: int) -> None:
    chosen = [line for line in found if line["gradient_rank"] not in {None, _BLOCK}]
    if chosen:
        label = f"{chosen[0]['options']['momentum']}, fewer numbers in more bits"
        _errors(axes, chosen, dense, fmt="x", label=label)
        for line in chosen:
            place = (line["gradient_bytes"] / dense, line["mean"])
            axes.annotate(f" {line['gradient_rank']} x {line['gradient_bits']}", place)


def _errors(axes: Axes, lines: Sequence[Line], dense: int, *, fmt: str, label: str) -> None:
    ordered = sorted(lines, key=lambda line: line["gradient_bytes"])
    axes.errorbar(
        [line["gradient_bytes"] / dense for line in ordered],
        [line["mean"] for line in ordered],
        yerr=[line["spread"] / 2 for line in ordered],
        fmt=fmt,
        capsize=3,
        label=label,
    )


def main() -> None:
    """Draw the committed results again: python -m tests.bench.quality_bytes."""
    import json

    folder = Path(__file__).with_name("results")
    table = json.loads((folder / "few_bits.json").read_text(encoding="utf-8"))
    title = f"{table['parameters']:,} parameters, {table['tokens']:,} tokens per run"
    draw_bytes(table["rows"], folder, title)


if __name__ == "__main__":
    main()
