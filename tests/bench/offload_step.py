# SPDX-License-Identifier: Apache-2.0
"""Time of a step under ZeRO-Offload: Flora beside DeepSpeedCPUAdam and torch's fused AdamW.

    python -m tests.bench.offload_step --compile
    python -m tests.bench.offload_step --ranks 2 --stage 2

Engines with ``offload_optimizer: {device: cpu}`` under the deepspeed launcher, all in one process
group, in turns; clocks and ratios are those of tests/bench/sharded_step.py. On a machine without an
accelerator nothing is moved between devices, but the path is the same: gradients are copied into
fp32 partitions on the CPU, and the optimizer steps those. ``--compile`` lets DeepSpeed compile its
CPU Adam, once, for minutes; ranks that found it missing would compile it while others wait.

"state" is what the optimizer keeps on one rank, in bytes per parameter of the whole model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from torch import nn

from flora_dist import Flora
from tests.bench.peers import compile_cpu_adam, state_bytes
from tests.bench.sharded_step import (
    LENGTH,
    WARM_UP,
    Run,
    Times,
    engine_run,
    in_turns,
    print_times,
)
from tests.bench.wire_setups import Llama
from tests.conftest import launched_pool_of

BASE = "DeepSpeedCPUAdam"
NAMES = (BASE, "AdamW, fused", "Flora, blend", "Flora, none")
ROUNDS = 20


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """At settings that are alike: no decay."""
    if name == BASE:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        made: torch.optim.Optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-4)
        return made
    if name == "AdamW, fused":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    momentum = name.partition(", ")[2]
    settings = {"momentum": momentum, "rank": 8, "block": 64, "state_dtype": "float32"}
    return Flora(model.named_parameters(), lr=1e-4, **settings)  # type: ignore[arg-type]


def engine_of(name: str, model_name: str, stage: int) -> Run:
    """An engine whose optimizer and gradients are offloaded."""
    torch.manual_seed(0)
    model = Llama(model_name, tokens=LENGTH)
    zero: dict[str, Any] = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    return engine_run(model, optimizer_of(name, model), zero)


def measure(model_name: str, stage: int, rounds: int) -> tuple[Times, dict[str, float]]:
    """On every rank: all optimizers in turns; and what each keeps, by parameter of the model."""
    model = Llama(model_name, tokens=LENGTH)
    words = model.network.config.vocab_size
    numbers = sum(each.numel() for each in model.parameters())
    runs = {name: engine_of(name, model_name, stage) for name in NAMES}
    in_turns(runs, WARM_UP, words)
    times = in_turns(runs, rounds, words)
    state = {name: state_bytes(run.optimizer.state) / numbers for name, run in runs.items()}
    return times, state


def main() -> int:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--model", default="llama_9m", help="of configs/model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compile", action="store_true", help="DeepSpeed's CPU Adam, and end")
    asked = parser.parse_args()
    if asked.compile:
        return compile_cpu_adam(sys.executable)
    pool = launched_pool_of(asked.ranks)
    times, state = pool(measure, asked.model, asked.stage, asked.rounds)[0]
    pool.close()
    print(f"ZeRO-{asked.stage}, offload to the CPU, x{asked.ranks}, {asked.model}")
    print_times(times, BASE)
    for name, size in state.items():
        print(f"  state      {name:18} {size:9.3f} bytes per parameter")
    medians = {
        name: {clock: statistics.median(own) for clock, own in seconds.items()}
        for name, seconds in times.items()
    }
    asked_for = {"stage": asked.stage, "ranks": asked.ranks, "model": asked.model}
    print(json.dumps({**asked_for, "median_s": medians, "state": state}))
    return 0


if __name__ == "__main__":
    # Ranks find a body by the name of its module, which must not be __main__.
    from tests.bench import offload_step

    sys.exit(offload_step.main())
