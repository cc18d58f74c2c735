# SPDX-License-Identifier: Apache-2.0
"""Time of `step()` side by side: Flora's rules, AdamW and Adafactor on the same gradients.

    python -m tests.bench.step_time

Rounds interleave the optimizers, so that a busy machine slows all alike; read the ratios.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from flora_dist import Flora

ROUNDS = 15
SHAPES = {
    "llama-9m layers, 28 small matrices": [(128, 128)] * 16 + [(352, 128)] * 8 + [(128, 352)] * 4,
    "llama-60m layer and embedding": [(512, 512)] * 4
    + [(1376, 512)] * 2
    + [(512, 1376), (32000, 512)],
}


def measure(shapes: list[tuple[int, int]]) -> dict[str, float]:
    """Median seconds per step of each optimizer."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "AdamW (torch, fused)": torch.optim.AdamW(parameters, fused=True),
        "AdamW (torch)": torch.optim.AdamW(parameters),
        "Adafactor (torch)": torch.optim.Adafactor(parameters),
    }
    for rule in ("flora", "flora_strict", "blend", "none"):
        optimizers[f"Flora, {rule}"] = Flora(parameters, momentum=rule, rank=8, block=64)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(ROUNDS):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print one table per set of shapes."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {ROUNDS}")
    for title, shapes in SHAPES.items():
        times = measure(shapes)
        base = times["AdamW (torch)"]
        print(f"\n{title}")
        for name, value in times.items():
            print(f"  {name:22} {1e3 * value:8.1f} ms   {value / base:5.2f} x AdamW")


if __name__ == "__main__":
    main()
