# SPDX-License-Identifier: Apache-2.0
"""Time and memory of ``step()`` beside torch's optimizers, on the shapes of models.

    python -m tests.bench.step --threads 1
    python -m tests.bench.step --only 60m --clock thread

Optimizers of other packages in the same run: tests/bench/peers.py.

Interleaved in one process, so that all meet the same other work on the machine; medians with
quartiles: read the ratios. ``--clock thread`` counts this thread's CPU time, which other work
disturbs less; with one thread only. One table and one line of JSON for each set of shapes and
dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.kernels.library import found
from tests.kernels.paths import path

ROUNDS = 15
BASE = "AdamW (torch, fused)"
Shapes = Sequence[tuple[int, ...]]
Row = dict[str, float]
Stepped = tuple[torch.optim.Optimizer, str]
"""An optimizer, and the path of kernels that it steps by."""
SMALL = [(128, 128)] * 16 + [(352, 128)] * 8 + [(128, 352)] * 4 + [(256, 128)] * 2
LARGE = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
SHAPES: dict[str, Shapes] = {
    "llama-9m, 39 tensors": [*SMALL, *[(128,)] * 9],
    "llama-60m, 75 tensors": [*LARGE * 8, (32000, 512), (32000, 512), *[(512,)] * 17],
    "llama-7b, one layer": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
    "64 experts of 256 x 128": [(64, 256, 128)],
    "75 tensors of 512 numbers": [(8, 64)] * 75,
    "500 tensors of 64 numbers": [(8, 8)] * 500,
}
LAYER_7B = "llama-7b, one layer"
RULES = ("blend", "none", "flora", "flora_strict")
OTHERS: dict[str, dict[str, Any]] = {
    "ademamix": {"momentum": "ademamix"},
    "growth": {"momentum": "blend", "growth": 1.01},
    "columns": {"momentum": "blend", "normalise": "columns"},
    "apollo": {"momentum": "apollo"},
    "subspace_adam": {"momentum": "subspace_adam"},
    "tiles": {"momentum": "blend", "rank": 4, "orthogonalise": 64},
}
IN_FLOAT32: dict[str, Any] = {"state_dtype": "float32"}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}


def optimizers_of(parameters: list[nn.Parameter], paths: Sequence[str]) -> dict[str, Stepped]:
    """By name; Flora's by each of these paths of kernels."""
    named = [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]
    made: dict[str, Stepped] = {
        BASE: (torch.optim.AdamW(parameters, lr=1e-5, fused=True), "torch"),
        "AdamW (torch, foreach)": (torch.optim.AdamW(parameters, lr=1e-5, foreach=True), "torch"),
        "Adafactor (torch)": (torch.optim.Adafactor(parameters, lr=1e-5), "torch"),
    }
    for kernels in paths:
        settings = {rule: {"momentum": rule} for rule in RULES} | OTHERS
        for name, own in settings.items():
            optimizer = Flora(named, lr=1e-5, **{"rank": 8, **IN_FLOAT32, **own})
            made[f"Flora, {name}, {kernels}"] = optimizer, kernels
        defaults = {"": {}, " in float32": IN_FLOAT32, " in 4 bits": {"state_bits": 4}}
        for name, own in defaults.items():
            made[f"Flora, default{name}, {kernels}"] = Flora(named, lr=1e-5, **own), kernels
    return made


def measure(
    optimizers: dict[str, Stepped],
    gradients: Sequence[tuple[nn.Parameter, Tensor]],
    rounds: int,
    clock: Callable[[], float],
) -> Iterator[dict[str, float]]:
    """Seconds of each round's step, by optimizer."""
    for optimizer, name in optimizers.values():
        with path(name):
            for _ in range(2):
                give(gradients)
                optimizer.step()
    for _ in range(rounds):
        seconds = {}
        for name, (optimizer, _) in optimizers.items():
            give(gradients)
            start = clock()
            optimizer.step()
            seconds[name] = clock() - start
        yield seconds


def give(gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Put gradients where they were: some packages' optimizers drop them as they step."""
    for parameter, gradient in gradients:
        parameter.grad = gradient


def extra_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What one step takes of memory beyond what is resident before it, at its peak."""
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    optimizer.step()
    return max(0, _status("VmHWM") - resident)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have a line {field}; it has none. Use Linux.")


def table(
    rounds: Sequence[dict[str, float]], extra: dict[str, int], weights: int
) -> dict[str, Row]:
    """Milliseconds: median and least; quartiles of the ratio to fused AdamW of the same round."""
    rows = {}
    for name in rounds[0]:
        own = [seconds[name] for seconds in rounds]
        ratios = [seconds[name] / seconds[BASE] for seconds in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ms": 1e3 * statistics.median(own),
            "least_ms": 1e3 * min(own),
            "ratio": middle,
            "low": low,
            "high": high,
            "extra": extra[name] / weights,
        }
    return rows


def run(
    shapes: Shapes,
    dtype: torch.dtype,
    rounds: int,
    clock: Callable[[], float],
    make: Callable[[list[nn.Parameter]], dict[str, Stepped]],
) -> dict[str, Row]:
    """The table of one set of shapes, for the optimizers that ``make`` returns."""
    torch.manual_seed(0)
    parameters = [nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in shapes]
    gradients = [(parameter, torch.randn_like(parameter)) for parameter in parameters]
    give(gradients)
    weights = sum(each.numel() * each.element_size() for each in parameters)
    optimizers = make(parameters)
    seconds = list(measure(optimizers, gradients, rounds, clock))
    extra = {}
    for name, (optimizer, _) in optimizers.items():
        give(gradients)
        extra[name] = extra_bytes(optimizer)
    return table(seconds, extra, weights)


def options(description: str | None) -> argparse.ArgumentParser:
    """What this bench and that of peers may be asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", default="", help="shapes whose title holds this")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    return parser


def begin(asked: argparse.Namespace) -> None:
    """Set threads, and say where and how it is measured."""
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, {asked.threads} threads, kernels: {found().said}")
    print(f"{asked.clock} clock, {asked.rounds} rounds, load {os.getloadavg()[0]:.1f}")


def told(row: Row) -> str:
    """A row of the table, after its name."""
    spread = f"{row['low']:.2f} to {row['high']:.2f}"
    return (
        f"{row['ms']:9.2f} ms {row['ratio']:7.2f} x ({spread})"
        f"  memory of a step {100 * row['extra']:5.1f} %"
    )


def main() -> None:
    """Print one table for each set of shapes and dtype, each with a line of JSON."""
    parser = options(__doc__)
    parser.add_argument("--paths", default="native,torch", help="of kernels, with commas")
    asked = parser.parse_args()
    begin(asked)
    make = partial(optimizers_of, paths=asked.paths.split(","))
    for title, shapes in SHAPES.items():
        # So many optimizers of one layer of 7b take 15 GB in float32: only where it is asked for.
        if asked.only not in title or (title == LAYER_7B and not asked.only):
            continue
        for dtype in asked.dtype or ["float32", "bfloat16"]:
            rows = run(shapes, getattr(torch, dtype), asked.rounds, CLOCKS[asked.clock], make)
            print(f"\n{title}, {dtype}")
            for name, row in rows.items():
                print(f"  {name:28} {told(row)}")
            print(json.dumps({"shapes": title, "dtype": dtype, "rows": rows}))


if __name__ == "__main__":
    main()
