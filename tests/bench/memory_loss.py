# SPDX-License-Identifier: Apache-2.0
"""Validation loss against the peak memory of a process, with AdamW and with Flora.

    python -m tests.bench.memory_loss            trains, and writes results/loss_by_memory.*
    python -m tests.bench.memory_loss --draw     draws results/loss_by_memory.json again

configs/memory_demo.yaml (85 million parameters) on one process, each with the better of two rates
of learning, one seed, no limit of memory. It says what fits and that it trains, not what is better.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.bench.quality import machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "loss_by_memory.json"
SETUPS = {
    "AdamW": ["optimizer={name: adamw, lr: LR}"],
    "Flora, ratio 16": ["optimizer.lr=LR"],
    "Flora, gradients as sketches": [
        *("optimizer.lr=LR", "gradients.level=compressed", "gradients.rank=16")
    ],
}
RATES = (5e-4, 1e-3)
MIB = 2.0**20


def trained(settings: list[str], lr: float) -> dict[str, Any]:
    """Train once in a process of its own; what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        sets = [setting.replace("LR", str(lr)) for setting in settings]
        sets += [f"output.folder={folder}", "output.tensorboard=false"]
        command = [sys.executable, "-m", "flora_dist.trainer", "--config"]
        command += ["configs/memory_demo.yaml", *(w for each in sets for w in ("--set", each))]
        subprocess.run(command, cwd=ROOT, check=True)
        summary = json.loads((Path(folder) / "memory_demo" / "summary.json").read_text())
        measured = summary["measured"]
    return {
        "lr": lr,
        "validation_loss": measured["validation_loss"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "state_bytes": measured["state_bytes"],
        "parameters": summary["parameters"],
        "tokens": measured["tokens"],
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss against peak memory, a point for each setup."""
    figure = Figure(figsize=(7.0, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, row in found["rows"].items():
        x, y = row["peak_memory_bytes"] / MIB, row["validation_loss"]
        axes.plot(x, y, "o", markersize=9)
        words = f"{name}\n{x:,.0f} MiB, lr {row['lr']:g}"
        axes.annotate(words, (x, y), textcoords="offset points", xytext=(0, 10), ha="center")
    axes.margins(x=0.25, y=0.45)
    axes.set_xlabel("peak memory of the process (MiB)")
    axes.set_ylabel("validation loss (nats/byte)")
    axes.set_title(f"85 million parameters, {found['tokens']:,} tokens, one seed", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Trains, or draws again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    if not parser.parse_args().draw:
        rows: dict[str, Any] = {}
        for name, settings in SETUPS.items():
            tries = [trained(settings, lr) for lr in RATES]
            rows[name] = min(tries, key=lambda one: one["validation_loss"])
        found = {
            "command": "python -m tests.bench.memory_loss",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": machine(torch.device("cpu")),
            "torch": torch.__version__,
            "tokens": next(iter(rows.values()))["tokens"],
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    found = json.loads(RESULTS.read_text())
    draw(found, RESULTS.with_suffix(".png"))
    for name, row in found["rows"].items():
        print(
            f"{name:30} {row['peak_memory_bytes'] / MIB:8,.0f} MiB  "
            f"state {row['state_bytes'] / MIB:6,.0f} MiB  loss {row['validation_loss']:.3f}  "
            f"lr {row['lr']:g}"
        )


if __name__ == "__main__":
    main()
