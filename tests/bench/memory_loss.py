# SPDX-License-Identifier: Apache-2.0
"""Draws validation loss against peak memory, from committed results alone; trains nothing.

    python -m tests.bench.memory_loss        writes results/loss_by_memory.png

Losses are those measured on the small model of the quality bench (results/*.json); memory is what
the planner computes for a llama of 1.3 billion parameters on one GPU, as in the README's table.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flora_dist import cli

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS / "loss_by_memory.png"
COMMAND = (
    *("plan", "--model", str(ROOT / "configs/model/llama_1b.json"), "--gpus", "1", "--json"),
    *("--backend", "fsdp2", "--precision", "bfloat16", "--checkpointing", "--micro-batch", "8"),
)
LIMIT_GIB = 16.0
LEAST = ("--state-bits", "4", "--gradients", "compressed")
# What the picture calls it: results' file and row; the plan's arguments and method.
POINTS = {
    "AdamW": ("quality", "AdamW", (), "AdamW"),
    "8-bit AdamW": ("packages", "AdamW 8-bit (bitsandbytes)", (), "AdamW, 8-bit"),
    "GaLore": ("packages", "GaLore, rank 32", (), "GaLore, rank 512 (ddp)"),
    "Flora (default)": (
        *("state_bits_8_long", "blend, momentum 16 x 8 bits, gain 1"),
        *((), "Flora 1/4, dense"),
    ),
    "Flora, rank 4, tiles": ("tiles", "blend, rank 4, tiles of 64", (), "Flora 1/16, dense"),
    "Flora, all in few bits": (
        *("all_in_few_bits", "Flora, alone, all in few bits"),
        *(LEAST, "Flora 1/4, compressed, 4 bits, bf16 alone"),
    ),
}


def seeds_of(file: str, row: str) -> list[float]:
    """Validation losses of one row of committed results, one for each seed."""
    rows = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    (found,) = (each for each in rows if each["row"] == row)
    losses: list[float] = found["seeds"]
    return losses


def gib_of(method: str, arguments: tuple[str, ...]) -> float:
    """GiB on one GPU by the planner."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert cli.main([*COMMAND, *arguments]) == 0
    plans: list[dict[str, Any]] = json.loads(told.getvalue())["plans"]
    (plan,) = (each for each in plans if each["method"] == method)
    return float(plan["total_bytes"]) / 2**30


def points() -> dict[str, tuple[float, list[float]]]:
    """Memory and losses by name."""
    return {
        name: (gib_of(method, arguments), seeds_of(file, row))
        for name, (file, row, arguments, method) in POINTS.items()
    }


def draw(path: Path) -> None:
    """A point for each method, a line from seed to seed."""
    figure = Figure(figsize=(7.0, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (gib, losses) in points().items():
        mean = sum(losses) / len(losses)
        (drawn,) = axes.plot([gib] * len(losses), losses, "-", linewidth=2)
        axes.plot(gib, mean, "o", markersize=9, color=drawn.get_color())
        words = f"{name}\n{gib:.1f} GiB, {mean:.2f}"
        # The default has neighbours: words above and to the left of them, to the right of others.
        is_left = LIMIT_GIB - 2 < gib < LIMIT_GIB - 1
        place, side = ((-8, 14), "right") if is_left else ((10, 0), "left")
        axes.annotate(words, (gib, mean), place, textcoords="offset points", ha=side, va="center")
    axes.axvline(LIMIT_GIB, color="0.6", linestyle=":")
    axes.annotate("16 GiB", (LIMIT_GIB, 0.02), xycoords=("data", "axes fraction"), color="0.4")
    axes.margins(y=0.2)
    axes.set_xlim(5.0, 30.0)
    axes.set_xlabel("GiB on one GPU, computed for 1.3 billion parameters")
    axes.set_ylabel("validation loss, measured on 0.5 million\n(nats/byte, two seeds)")
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    draw(PICTURE)
    print(f"wrote {PICTURE}")
