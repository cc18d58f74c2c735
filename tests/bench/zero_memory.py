# SPDX-License-Identifier: Apache-2.0
"""Prints what ZeRO holds for gradients when Flora sketches them: much of it is DeepSpeed's own.

    python -m tests.bench.zero_memory
    python -m tests.bench.zero_memory --model llama_60m --stages 2

Bytes of live tensors (tests/bench/memory.py) on rank 0 of 2 beyond parameters and masters: 8
matrices of 512 x 1024 in fp32 and 4 micro-batches of 4 samples, so that activations do not count;
ratio 16, buckets of 500,000 elements. With ``--model``: what a model of configs/model holds for
gradients after any of 4 micro-batches, on the rank that has most, sketched as by default, all 64
numbers of a block in 4 bits, with fewer numbers, with 2 bits, and as 4 in fp32
(tests/planner/measured.py).
"""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.memory import LiveBytes
from tests.conftest import launched_pool_of
from tests.planner.compared import measured
from tests.planner.runs import MODELS, Case, build

COLUMNS, ROWS, PAIRS, MICRO_BATCHES = 512, 1024, 4, 4
LEVELS = ("dense", "compressed", "fused")
KEPT = {
    "64 x 4 bits": {"gradient_bits": 4},
    "56 x 4 bits": {"gradient_bits": 4, "gradient_rank": 56},
    "64 x 2 bits": {"gradient_bits": 2},
    "4 in fp32": {"gradient_bits": 32},
}
"""Of a block's 64 numbers."""


class Deep(nn.Module):
    """Matrices alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(PAIRS))
        self.down = nn.ModuleList(nn.Linear(ROWS, COLUMNS, bias=False) for _ in range(PAIRS))

    def forward(self, x_NI: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x_NI = x_NI + down(up(x_NI).tanh())
        return x_NI.square().mean()


def held(stage: int, level: str) -> tuple[int, int, int]:
    """Between two micro-batches, at the peak of a backward, at the peak of the step."""
    from tests.zero.small import config_of, start

    engine, flora = start(
        config_of(
            stage,
            optimizer={"type": "Flora", "params": {"rank": 4, "block": 64}},
            zero_optimization={
                "stage": stage,
                "reduce_bucket_size": 500_000,
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_live_parameters": ROWS * COLUMNS,
                "stage3_max_reuse_distance": 0,
            },
            gradient_accumulation_steps=MICRO_BATCHES,
            flora={"gradients": level} | ({} if level == "dense" else {"gradient_bits": 32}),
        ),
        model=Deep(),
    )
    buffers = permanent(engine)
    known = [*engine.module.parameters(), *(slot.tensor for slot in flora.slots()), *buffers]
    for _ in range(MICRO_BATCHES):
        train(engine)
    between = in_backward = 0
    with LiveBytes(known=known) as live:
        for micro_batch in range(MICRO_BATCHES):
            live.peak = 0
            engine.backward(engine(torch.ones(4, COLUMNS)))
            in_backward = max(in_backward, live.peak)
            between = live.now() if micro_batch < MICRO_BATCHES - 1 else between
            live.peak = 0
            engine.step()
        in_step = live.peak
    engine.destroy()
    always = sum(buffer.nbytes for buffer in buffers)
    return between + always, in_backward + always, in_step + always


def train(engine: Any) -> None:
    """One micro-batch."""
    engine.backward(engine(torch.ones(4, COLUMNS)))
    engine.step()


def permanent(engine: Any) -> list[Tensor]:
    """ZeRO-3's buffer of gradients, made before anybody watches."""
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    return [] if buffer is None else [buffer]


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="of configs/model")
    parser.add_argument("--stages", default="1,2,3")
    asked = parser.parse_args()
    if asked.model is None:
        of_matrices()
        return
    stages = [int(stage) for stage in asked.stages.split(",")]
    with torch.device("meta"):
        dense = 4 * sum(p.numel() for p in build(MODELS / f"{asked.model}.json").parameters())
    print(f"| {asked.model} | sketched gradients and the rest | of {dense:,} bytes in fp32 |")
    print("|---|---|---|")
    for stage in stages:
        for how, kept in KEPT.items():
            found = of_model(asked.model, stage, kept)
            print(f"| zero-{stage}, {how} | {found:,} | {found / dense:.4f} |", flush=True)
    launched_pool_of(2).close()


def of_model(name: str, stage: int, kept: dict[str, int]) -> int:
    """Sketches, their matrices, what is dense, and DeepSpeed's own buffers."""
    case = Case(
        model=name,
        backend=f"zero{stage}",
        ratio=16,
        gradients="compressed",
        **kept,
        accumulate=MICRO_BATCHES,
    )
    found = measured(case)
    return found["gradients"] + found["accumulators"]


def of_matrices() -> None:
    """The table of eight matrices."""
    pool = launched_pool_of(2)
    size = 2 * PAIRS * ROWS * COLUMNS * 4
    print(f"torch {torch.__version__}, {platform.machine()}; full gradient {size / 1e6:.1f} MB")
    print(f"{'':17}{'between micro-batches':>23}{'peak of backward':>18}{'peak of step':>14}")
    for stage in (1, 2, 3):
        for level in LEVELS:
            between, in_backward, in_step = (b / 1e6 for b in pool(held, stage, level)[0])
            row = f"zero-{stage} {level:<10}{between:>23.1f}{in_backward:>18.1f}{in_step:>14.1f}"
            print(row, flush=True)
    pool.close()


if __name__ == "__main__":
    # Ranks find a body by the name of its module, which must not be __main__.
    from tests.bench import zero_memory

    zero_memory.main()
