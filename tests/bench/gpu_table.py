# SPDX-License-Identifier: Apache-2.0
"""Tables of what ``launch/gpu.sh`` has left in a folder.

    python -m tests.bench.gpu_table runs/gpu/0123456789ab

Kernels beside fused AdamW, a training run, and losses by row and learning rate. Slices that are not
there are named.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_dist.columns import aligned

SLICES = ("bits", "runs", "records", "graph", "marked", "step", "sketch", "training", "60m", "130m")
Found = Mapping[str, Any]


def read(folder: Path) -> dict[str, Found]:
    """What each slice found.

    Raises:
        ValueError: the folder has no result of a slice.
    """
    paths = {name: folder / f"{name}.json" for name in SLICES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(
            f"a folder of results has files such as step.json; {folder} has none. Name the one "
            "that ./launch/gpu.sh wrote, or run that first."
        )
    return found


def lines_of(found: Mapping[str, Found]) -> Iterator[str]:
    """Everything, as text."""
    for name, one in found.items():
        where = f"{one['device']}, torch {one['torch']}"
        rehearsed = ", a rehearsal: its numbers mean nothing" if one["rehearsal"] else ""
        state = f"{len(one['faults'])} faults" if one["faults"] else "passed"
        yield f"{name}: {state}, {one['seconds']} s, {where}{rehearsed}"
    if missing := [name for name in SLICES if name not in found]:
        yield f"not there: {', '.join(missing)}"
    if "step" in found:
        yield from _steps(found["step"])
    if "training" in found:
        yield from _training(found["training"])
    for name in ("60m", "130m"):
        if name in found:
            yield from _losses(found[name])


def _steps(found: Found) -> Iterator[str]:
    for dtype in ("torch.bfloat16", "torch.float32"):
        copy = f"a copy: {found['copy GB/s']:.0f} GB/s"
        yield f"\nstep(), {found['elements']:,} elements, {dtype}; {copy}"
        rows = [("optimizer", "ms", "over fused AdamW", "GB/s", "host ms", "extra MiB")]
        for name, row in found[dtype].items():
            rate = f"{row['GB/s']:.0f}" if "GB/s" in row else ""
            extra = f"{row['extra bytes'] / 2**20:.0f}"
            times = (f"{row['ms']:.2f}", f"{row['ratio']:.2f}", rate, f"{row['host ms']:.2f}")
            rows.append((name, *times, extra))
        yield aligned(rows, left=1)


def _training(found: Found) -> Iterator[str]:
    yield "\ntraining, a small model"
    rows = [("optimizer", "first loss", "last loss", "tokens/s")]
    for name, row in found.items():
        if isinstance(row, dict):
            losses = (f"{row['first loss']:.3f}", f"{row['last loss']:.3f}")
            rows.append((name, *losses, f"{row['tokens/s']:,.0f}"))
    yield aligned(rows, left=1)


def _losses(found: Found) -> Iterator[str]:
    runs: Sequence[Found] = found["runs"]
    yield f"\nllama-{found['network']}, {found['tokens']:,} tokens, validation loss by lr"
    rates = sorted({run["lr"] for run in runs})
    shown = [f"{rate:g}" for rate in rates]
    rows = [("row", "state B/param", *shown, "best", "- AdamW", "tokens/s")]
    for name in dict.fromkeys(run["row"] for run in runs):
        own = {run["lr"]: run for run in runs if run["row"] == name}
        losses = [f"{own[rate]['loss']:.4f}" if rate in own else "" for rate in rates]
        best, base = _best(runs, name), _best(runs, "AdamW")
        last = own[max(own)]
        state, speed = f"{last['state bytes per parameter']:.3f}", f"{last['tokens/s']:,.0f}"
        rows.append((name, state, *losses, f"{best:.4f}", f"{best - base:+.4f}", speed))
    yield aligned(rows, left=1)


def _best(runs: Sequence[Found], row: str) -> float:
    """The lowest loss of a row; one that diverged counts as infinite."""
    losses = [run["loss"] for run in runs if run["row"] == row]
    return min((each for each in losses if math.isfinite(each)), default=math.inf)


def main() -> int:
    """Print the tables; the exit code is 1 if a slice has found a fault, 2 without results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    try:
        found = read(asked.folder)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    print("\n".join(lines_of(found)))
    return int(any(one["faults"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
