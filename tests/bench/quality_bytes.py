# SPDX-License-Identifier: Apache-2.0
"""The picture of gradients in few bits: loss by the bytes that are kept of them, and sent.

The losses are those of one process: the mean over ranks, rounded once more, is not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from flora_dist.core.records import Code, mean_bits
from tests.bench.quality_plan import ADAMW, CENTRE
from tests.bench.quality_table import Line, figure_of, save

_BLOCK: int = CENTRE["block"]
_RULES = ("blend", "none")
_MARKS = {1: "o-", 8: "s--", 16: "d:"}
"""By micro-batches of a step."""


Place = Callable[[Line], float]
"""Of a line on an axis of bytes, over those of dense gradients."""


def draw_bytes(found: Sequence[Line], folder: Path, title: str) -> None:
    """loss_by_bytes.png, complete or not at all: loss by what is kept, and by what DDP sends."""
    figure = figure_of(14.0, 5.8, title)
    complete = [line for line in found if line["mean"] is not None]
    dense = max((line["gradient_bytes"] for line in complete), default=1)
    kept, sent = figure.subplots(1, 2, sharey=True)
    _panel(kept, complete, lambda line: line["gradient_bytes"] / dense)
    kept.set_xlabel("bytes kept of a gradient")
    kept.set_ylabel("validation loss (nats/token), mean and range of the seeds")
    whole = _in_full(complete)
    _panel(sent, complete, lambda line: (_sent(line, whole) / 2) / dense)
    sent.set_xlabel("bytes that a rank of DDP sends per step: sketches, then their mean")
    if kept.has_data():
        kept.legend(fontsize=8)
    save(figure, folder / "loss_by_bytes.png")


def _panel(axes: Axes, complete: Sequence[Line], place: Place) -> None:
    for rule in _RULES:
        for micro_batches, marks in _MARKS.items():
            _all_numbers(axes, list(_of(complete, rule, micro_batches)), place, marks)
        _fewer_numbers(axes, list(_of(complete, rule, 1)), place)
    for line in complete:
        if line["row"] == ADAMW:
            axes.axhline(line["mean"], 0, 1, ls="--", color="k", label=line["row"])
    axes.set_xscale("log", base=2)
    ticks = (1, 8, 16, 32)
    axes.set_xticks([1 / each for each in ticks], ["fp32", *(f"1/{each}" for each in ticks[1:])])
    axes.grid(alpha=0.3)


def _code(line: Line) -> Code:
    return Code(bits=line["gradient_bits"], numbers=line["gradient_rank"])


def _in_full(complete: Sequence[Line]) -> float:
    """Bytes of what is not sketched, from two rows of as many blocks and other bits."""
    few = [line for line in complete if line["gradient_rank"] == _BLOCK]
    if len({line["gradient_bits"] for line in few}) < 2:
        return 0.0
    one, other = few[0], next(x for x in few if x["gradient_bits"] != few[0]["gradient_bits"])
    per_block = _code(one).bytes - _code(other).bytes
    blocks = (one["gradient_bytes"] - other["gradient_bytes"]) / per_block
    return float(one["gradient_bytes"] - blocks * _code(one).bytes)


def _sent(line: Line, whole: float) -> float:
    """Twice what is kept in full, as an all-reduce sends it; or records, and those of the mean."""
    if line["gradient_rank"] is None:
        return 2.0 * line["gradient_bytes"]
    code = _code(line)
    mean = Code(bits=mean_bits(code.bits), numbers=code.numbers)
    records = (line["gradient_bytes"] - whole) / code.bytes
    return 2.0 * whole + records * (code.bytes + mean.bytes)


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


def _all_numbers(axes: Axes, found: Sequence[Line], place: Place, marks: str) -> None:
    chosen = [line for line in found if line["gradient_rank"] in {None, _BLOCK}]
    few = [line for line in chosen if line["gradient_rank"] is not None]
    if not few:
        return
    several = few[0]["micro_batches"]
    after = "" if several == 1 else f", {several} micro-batches"
    label = f"{few[0]['options']['momentum']}, all numbers in few bits{after}"
    _errors(axes, chosen, place, fmt=marks, label=label)


def _fewer_numbers(axes: Axes, found: Sequence[Line], place: Place) -> None:
    chosen = [line for line in found if line["gradient_rank"] not in {None, _BLOCK}]
    if chosen:
        label = f"{chosen[0]['options']['momentum']}, fewer numbers in more bits"
        _errors(axes, chosen, place, fmt="x", label=label)
        for line in chosen:
            numbers = f" {line['gradient_rank']} x {line['gradient_bits']}"
            axes.annotate(numbers, (place(line), line["mean"]))


def _errors(axes: Axes, lines: Sequence[Line], place: Place, *, fmt: str, label: str) -> None:
    ordered = sorted(lines, key=place)
    axes.errorbar(
        [place(line) for line in ordered],
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
