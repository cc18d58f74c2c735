# SPDX-License-Identifier: Apache-2.0
"""`fused` beside `compressed` and `dense`: time of a whole training step, and peak of its memory.

    python -m tests.bench.fused             about ten minutes on 2 cores; --rounds, --plans for less

llama-60m, the same tokens and settings for all. Rounds interleave the levels, so that a busy
machine slows all alike; read the ratios, each of which is of one round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import flora_dist
from flora_dist import Flora
from tests.bench.memory import LiveBytes
from tests.bench.state_bytes import BLOCK, llama_60m

SEED = 0
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
    Plan(micro_batches=4, sequences=2, length=256, rank=8),
    Plan(micro_batches=4, sequences=2, length=256, rank=4),
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
            flora_dist.attach(self.model, self.optimizer, level)

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


def time_of(run: Run, tokens: Tensor) -> Seconds:
    start = time.perf_counter()
    run.backward(tokens)
    middle = time.perf_counter()
    run.step()
    return Seconds(backward=middle - start, step=time.perf_counter() - middle)


def peaks_of(run: Run, tokens: Tensor) -> tuple[int, int]:
    """Bytes of activations, gradients and temporaries: (forward and backward, step)."""
    state = [t for s in run.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    known = [*run.model.parameters(), *run.model.buffers(), *state]
    with LiveBytes(known=known) as live:
        run.backward(tokens)
        backward, live.peak = live.peak, 0
        run.step()
    return backward, live.peak


def measure(plan: Plan, rounds: int) -> None:
    """Print one plan's table."""
    runs = {level: Run(plan, level) for level in LEVELS}
    peaks = {}
    for level, run in runs.items():  # the first step makes state and warms up
        time_of(run, tokens_of(plan, 0))
        peaks[level] = peaks_of(run, tokens_of(plan, 1))
    seconds: dict[str, list[Seconds]] = {level: [] for level in LEVELS}
    for number in range(rounds):
        for level, run in runs.items():
            seconds[level].append(time_of(run, tokens_of(plan, 2 + number)))
    print(f"\n{plan}: median of {rounds} rounds")
    print("              forward+backward    step   whole   times dense   quartiles   peak MB")
    for level in LEVELS:
        print(_line(level, seconds[level], seconds["dense"], peaks[level]), flush=True)


def _line(
    level: str, seconds: Sequence[Seconds], dense: Sequence[Seconds], peaks: tuple[int, int]
) -> str:
    middle = [
        statistics.median(values)
        for values in zip(*((s.backward, s.step, s.whole) for s in seconds), strict=True)
    ]
    ratios = [d.whole / s.whole for d, s in zip(dense, seconds, strict=True)]
    low, half, high = statistics.quantiles(ratios, n=4)
    return (
        f"{level:12}  {middle[0]:14.3f} s  {middle[1]:.3f} s  {middle[2]:.3f} s   {half:9.2f}   "
        f"{low:.2f} {high:.2f}   {peaks[0] / 1e6:.1f}, step {peaks[1] / 1e6:.1f}"
    )


def main() -> None:
    """Print one table per plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plans", type=int, nargs="*", default=range(len(PLANS)))
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for number in arguments.plans:
        measure(PLANS[number], arguments.rounds)


if __name__ == "__main__":
    main()
