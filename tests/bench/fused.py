# SPDX-License-Identifier: Apache-2.0
"""`fused` beside `compressed` and `dense`: time of a whole training step, and peak of its memory.

    python -m tests.bench.fused    about ten minutes on 2 idle cores; --rounds, --plans for less

llama-60m, the same tokens and settings for all. Rounds interleave the levels, so that a busy
machine slows all alike; read the ratios, each of which is of one round. Where others compute too:
--threads 1 --clock cpu, which counts this process's own time. Bytes are those of activations,
gradients and temporaries: their peak in forward and backward, and what stays until the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import flora_dist
from flora_dist import Flora
from tests.bench.memory import LiveBytes
from tests.bench.state_bytes import BLOCK, llama_60m

SEED = 0
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
LEVELS = ("dense", "compressed", "fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a step is."""

    micro_batches: int
    sequences: int
    """Of each micro-batch."""
    length: int
    rank: int
    """Numbers per block, of momentum and of gradients."""

    def __str__(self) -> str:
        tokens = self.sequences * self.length
        return f"{self.micro_batches} x {tokens} tokens, ratio {BLOCK // self.rank}"


PLANS = (
    Plan(micro_batches=1, sequences=4, length=256, rank=8),
    Plan(micro_batches=2, sequences=4, length=256, rank=8),
    Plan(micro_batches=2, sequences=4, length=256, rank=4),
    Plan(micro_batches=4, sequences=2, length=256, rank=8),
)


class Run:
    """One model at one level."""

    def __init__(self, plan: Plan, level: str) -> None:
        torch.manual_seed(SEED)
        self.model, self._plan = llama_60m(), plan
        self.optimizer = Flora(
            self.model.named_parameters(), lr=1e-3, rank=plan.rank, block=BLOCK, seed=SEED
        )
        if level != "dense":
            flora_dist.attach(self.model, self.optimizer, level, gradient_bits=32)

    def backward(self, tokens: Tensor) -> None:
        """Forward and backward of every micro-batch."""
        for part in tokens.chunk(self._plan.micro_batches):
            loss = self.model(input_ids=part, labels=part, use_cache=False).loss
            (loss / self._plan.micro_batches).backward()

    def step(self) -> None:
        """The optimizer's."""
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of one round."""

    backward: float
    """Forward and backward."""
    step: float

    @property
    def whole(self) -> float:
        return self.backward + self.step


def tokens_of(plan: Plan, number: int) -> Tensor:
    """One step's tokens."""
    generator = torch.Generator().manual_seed(number)
    shape = (plan.micro_batches * plan.sequences, plan.length)
    return torch.randint(0, 32000, shape, generator=generator)


def time_of(run: Run, tokens: Tensor, clock: Callable[[], float]) -> Seconds:
    start = clock()
    run.backward(tokens)
    middle = clock()
    run.step()
    return Seconds(backward=middle - start, step=clock() - middle)


def bytes_of(run: Run, tokens: Tensor) -> tuple[int, int]:
    """(peak of forward and backward, what stays until the step), without parameters and state."""
    state = [t for s in run.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    known = [*run.model.parameters(), *run.model.buffers(), *state]
    with LiveBytes(known=known) as live:
        run.backward(tokens)
        held = live.now()
    run.step()
    return live.peak, held


def measure(plan: Plan, rounds: int, clock: Callable[[], float]) -> None:
    """Print one plan's table."""
    runs = {level: Run(plan, level) for level in LEVELS}
    sizes = {}
    for level, run in runs.items():
        time_of(run, tokens_of(plan, 0), clock)  # makes state, and warms up
        sizes[level] = bytes_of(run, tokens_of(plan, 1))
    seconds: dict[str, list[Seconds]] = {level: [] for level in LEVELS}
    for number in range(rounds):
        for level, run in runs.items():
            seconds[level].append(time_of(run, tokens_of(plan, 2 + number), clock))
    print(f"\n{plan}: median of {rounds} rounds")
    print(HEADER)
    for level in LEVELS:
        print(_line(level, seconds[level], seconds["dense"], sizes[level], sizes["dense"]))


HEADER = (
    "level       seconds: forward+backward   step  whole   faster than dense (quartiles)"
    "   MB: peak (of dense)   held"
)


def _line(
    level: str,
    seconds: Sequence[Seconds],
    dense: Sequence[Seconds],
    size: tuple[int, int],
    dense_size: tuple[int, int],
) -> str:
    backward, step, whole = (
        statistics.median(values)
        for values in zip(*((s.backward, s.step, s.whole) for s in seconds), strict=True)
    )
    ratios = [d.whole / s.whole for d, s in zip(dense, seconds, strict=True)]
    low, half, high = statistics.quantiles(ratios, n=4)
    return (
        f"{level:10}{backward:27.3f} {step:6.3f} {whole:6.3f}{half:21.2f} ({low:.2f} to {high:.2f})"
        f"{size[0] / 1e6:13.1f} ({size[0] / dense_size[0]:4.0%}) {size[1] / 1e6:8.1f}"
    )


def main() -> None:
    """Print one table per plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plans", type=int, nargs="*", default=range(len(PLANS)))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {arguments.clock} seconds")
    for number in arguments.plans:
        measure(PLANS[number], arguments.rounds, CLOCKS[arguments.clock])


if __name__ == "__main__":
    main()
