# SPDX-License-Identifier: Apache-2.0
"""Time of adding a micro-batch's gradients to their sketches, by kernels and by torch's operators.

    python -m tests.bench.sketching --threads 1 --clock thread

On the shapes of llama-9m and of one layer of llama-60m, at rank 8 of 64: all parameters' gradients,
given, to C += G A^T. "first" begins a step, whose matrices A are drawn then; "next" are further
micro-batches of it; "4 bits" are those of all numbers of a block, kept in records. Then, of one
matrix in records, ns per element: putting a fresh sketch at levels, adding a gradient to it, the
mean of two ranks, 4 bits sent in 1, and a step. Both paths take turns in one process: read the
ratios.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from flora_dist.core.records import Code
from flora_dist.core.sketch.matrices import entry_scale, sketch_matrices
from flora_dist.gradients.cycle import Gradients
from flora_dist.kernels.records import Draws, add_to_records_, merged_records
from flora_dist.kernels.sketching import RowSketch
from tests.bench.step import CLOCKS, LARGE, SMALL, Shapes
from tests.kernels.paths import path

SHAPES: dict[str, Shapes] = {"llama-9m": SMALL, "a layer of llama-60m": LARGE}
PATHS = ("torch", "native")
MICRO_BATCHES = 3
ONE, BLOCK = (1376, 512), 64
"""Rows and columns of a matrix by itself."""
ONE_BIT = Code(bits=1, numbers=BLOCK)


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


def measure_records(rounds: int, clock: Callable[[], float]) -> None:
    """Print ns per element of what is done with records, by torch's operators and by kernels."""
    elements = torch.Size(ONE).numel()
    for bits in (4, 2, 1):
        works = {name: _works(bits, name) for name in PATHS}
        for what in works[PATHS[0]]:
            seconds: dict[str, list[float]] = {name: [] for name in PATHS}
            for name in PATHS * (rounds + 1):
                with path(name):
                    start = clock()
                    works[name][what]()
                    seconds[name].append(clock() - start)
            torch_ns, native_ns = (
                1e9 * statistics.median(seconds[name][1:]) / elements for name in PATHS
            )
            print(f"  {bits} bits, {what:18} torch {torch_ns:6.2f} ns  native {native_ns:6.2f} ns")


def _works(bits: int, name: str) -> dict[str, Callable[[], object]]:
    """What is timed, on matrices of one size."""
    rows, columns = ONE
    blocks, code = columns // BLOCK, Code(bits=bits, numbers=BLOCK)
    sketch = RowSketch(
        matrices_ERB=sketch_matrices(
            "hadamard", keys=[1], rank=BLOCK, block=BLOCK, dtype=torch.float32, device="cpu"
        ),
        first_column=0,
        is_hadamard=True,
        scale=entry_scale("hadamard", rank=BLOCK),
    )
    draws = Draws(key=1, runs=((0, rows),), columns=(0, columns), num_columns=columns)
    gradient = torch.randn(1, rows, columns)
    records = torch.zeros((1, rows, blocks, code.bytes), dtype=torch.uint8)
    (lines,), mean = records, Code(bits=4, numbers=BLOCK)
    with path(name):
        run = Run([ONE], bits)

    def step() -> None:
        with path("native"):
            run.add({"layers.0.weight": gradient[0]})
        run.optimizer.step()

    def average() -> None:
        merged_records([lines, lines], code, mean, draws, divisor=2.0, dtype=torch.float32)

    def send() -> None:
        merged_records([lines], code, ONE_BIT, None, divisor=1.0, dtype=torch.float32)

    return {
        "levels": lambda: add_to_records_(records, gradient, sketch, code, None),
        "adding": lambda: add_to_records_(records, gradient, sketch, code, draws),
        "mean of two": average,
        "sent in 1 bit": send,
        "levels and a step": step,
    }


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
    print(f"records of {ONE[0]} x {ONE[1]}")
    measure_records(parsed.rounds, CLOCKS[parsed.clock])


if __name__ == "__main__":
    main()
