# SPDX-License-Identifier: Apache-2.0
"""Time of `step()` side by side: Flora's rules by kernels and by torch, AdamW, Adafactor.

    python -m tests.bench.step_time --threads 2

Rounds interleave the optimizers on the same weights and gradients, so that a busy machine slows all
alike. A row is the median of a round's time over that of fused AdamW in the same round, with
quartiles: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from flora_dist import Flora
from flora_dist.kernels.library import found
from tests.kernels.paths import path

ROUNDS = 15
BASE = "AdamW (torch, fused)"
Shapes = Sequence[tuple[int, ...]]
SMALL = [(128, 128)] * 16 + [(352, 128)] * 8 + [(128, 352)] * 4 + [(256, 128)] * 2
LARGE = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
SHAPES: dict[str, Shapes] = {
    "llama-9m, 39 tensors": [*SMALL, *[(128,)] * 9],
    "llama-60m, 75 tensors": [*LARGE * 8, (32000, 512), (32000, 512), *[(512,)] * 17],
    "64 experts of 256 x 128": [(64, 256, 128)],
    "500 tensors of 64 numbers": [(8, 8)] * 500,
}
RULES = ("blend", "none", "flora", "flora_strict")


def optimizers_of(parameters: list[nn.Parameter]) -> dict[str, tuple[torch.optim.Optimizer, str]]:
    """By name, with the path of kernels that each steps by."""
    named = [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]
    made: dict[str, tuple[torch.optim.Optimizer, str]] = {
        BASE: (torch.optim.AdamW(parameters, lr=1e-5, fused=True), "torch"),
        "AdamW (torch, foreach)": (torch.optim.AdamW(parameters, lr=1e-5, foreach=True), "torch"),
        "Adafactor (torch)": (torch.optim.Adafactor(parameters, lr=1e-5), "torch"),
    }
    paths = ["native", "torch"] if found().operators is not None else ["torch"]
    for kernels in paths:
        for rule in RULES:
            optimizer = Flora(named, lr=1e-5, momentum=rule, rank=8, block=64)
            made[f"Flora, {rule}, {kernels}"] = optimizer, kernels
    return made


def measure(shapes: Shapes, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's step, by optimizer."""
    torch.manual_seed(0)
    parameters = [nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizers = optimizers_of(parameters)
    for optimizer, name in optimizers.values():
        with path(name):
            optimizer.step()
            optimizer.step()
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, (optimizer, _) in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median milliseconds, and quartiles of the ratio to fused AdamW of the same round."""
    rows = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[BASE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ms": 1e3 * statistics.median(own),
            "ratio": middle,
            "low": low,
            "high": high,
        }
    return rows


def main() -> None:
    """Print one table for each set of shapes and dtype, and all of them as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="shapes whose title holds this")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    print(f"torch {torch.__version__}, {parsed.threads} threads, kernels: {found().said}")
    results = {}
    for title, shapes in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            if parsed.only not in title:
                continue
            rows = table(measure(shapes, dtype, parsed.rounds))
            results[f"{title}, {dtype}"] = rows
            print(f"\n{title}, {dtype}")
            for name, row in rows.items():
                spread = f"{row['low']:.2f} to {row['high']:.2f}"
                print(f"  {name:28} {row['ms']:9.2f} ms {row['ratio']:7.2f} x ({spread})")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
