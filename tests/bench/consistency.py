# SPDX-License-Identifier: Apache-2.0
"""Time of `check_consistency()` beside that of `step()`, where everything is replicated.

    python -m tests.bench.consistency

One process in a group of its own: what is measured is the reading and hashing, not the network, on
which it is one all-reduce of 4176 bytes. Rounds interleave the two: read the ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from flora_dist import Flora
from tests.bench.step import ROUNDS, SHAPES


def measure(shapes: list[tuple[int, int]]) -> tuple[float, float]:
    """Median seconds of a step and of a check."""
    torch.manual_seed(0)
    named = {f"{i}": nn.Parameter(0.02 * torch.randn(shape)) for i, shape in enumerate(shapes)}
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer = Flora(named.items())
    calls = (optimizer.step, optimizer.check_consistency)
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    step, check = map(statistics.median, seconds)
    return step, check


def main() -> None:
    """Print one line per set of shapes."""
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {ROUNDS}")
        for title, shapes in SHAPES.items():
            step, check = measure(shapes)
            print(
                f"{title}: step {1e3 * step:.1f} ms, check {1e3 * check:.1f} ms, "
                f"{check / step:.2f} of a step"
            )
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
