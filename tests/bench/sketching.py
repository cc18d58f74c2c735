# SPDX-License-Identifier: Apache-2.0
"""Time of adding a micro-batch's gradients to their sketches, by kernels and by torch's operators.

    python -m tests.bench.sketching --threads 1 --clock thread

On the shapes of llama-9m and of one layer of llama-60m, at rank 8 of 64: all parameters' gradients,
given, to C += G A^T. "first" begins a step, whose matrices A are drawn then; "next" are further
micro-batches of it; "4 bits" are next ones kept in records. Both paths take turns in one process:
read the ratios.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from flora_dist.gradients.cycle import Gradients
from tests.bench.step import CLOCKS, LARGE, SMALL, Shapes
from tests.kernels.paths import path

SHAPES: dict[str, Shapes] = {"llama-9m": SMALL, "a layer of llama-60m": LARGE}
PATHS = ("torch", "native")
MICRO_BATCHES = 3


class Matrices(nn.Module):
    """Weights alone."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m, n, bias=False) for n, m in shapes)


class Run:
    """One model's sketches."""

    def __init__(self, shapes: Shapes, bits: int) -> None:
        torch.manual_seed(0)
        model = Matrices(shapes)
        self.optimizer = Flora(model.named_parameters(), rank=8, block=64)
        flora_dist.attach(model, self.optimizer, "compressed", gradient_bits=bits)
        assert isinstance(self.optimizer.gradients, Gradients)
        self.gradients = self.optimizer.gradients

    def add(self, given: dict[str, Tensor]) -> None:
        """A micro-batch."""
        for name, flow in self.gradients.flows.items():
            self.gradients.take(flow, given[name])


def measure(shapes: Shapes, dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> None:
    """Print a row for each kind of micro-batch."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for bits in (32, 4):
        runs = {}
        for name in PATHS:
            with path(name):
                runs[name] = Run(shapes, bits)
        given = {name: torch.randn(p.shape).to(dtype) for name, p in _parameters(shapes)}
        for count in range(rounds + 1):
            for name, run in runs.items():
                with path(name):
                    for number in range(MICRO_BATCHES):
                        start = clock()
                        run.add(given)
                        kind = "first" if number == 0 else "next"
                        kind = kind if bits == 32 else f"{kind}, {bits} bits"
                        if count:
                            seconds.setdefault((kind, name), []).append(clock() - start)
                    run.optimizer.step()
    for kind in dict.fromkeys(kind for kind, _ in seconds):
        before, after = (seconds[kind, name] for name in PATHS)
        ratios = statistics.quantiles([b / a for a, b in zip(before, after, strict=True)], n=4)
        print(
            f"  {kind:14} torch {1e3 * statistics.median(before):8.3f} ms"
            f"  native {1e3 * statistics.median(after):8.3f} ms"
            f"  {ratios[1]:.3f} x ({ratios[0]:.3f} to {ratios[2]:.3f})"
        )


def _parameters(shapes: Shapes) -> list[tuple[str, nn.Parameter]]:
    with torch.device("meta"):
        return list(Matrices(shapes).named_parameters())


def main() -> None:
    """Print a table for each set of shapes and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    for title, shapes in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            print(f"{title}, gradients in {dtype}")
            measure(shapes, dtype, parsed.rounds, CLOCKS[parsed.clock])


if __name__ == "__main__":
    main()
