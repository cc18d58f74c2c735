# SPDX-License-Identifier: Apache-2.0
"""Time of a training step of the quickstart's model on 2 processes, Flora beside AdamW.

    python -m tests.bench.sharded_step
    python -m tests.bench.sharded_step --layouts zero-2 --rounds 100 --profile

ZeRO-2 engines under the deepspeed launcher, and FSDP2. Both optimizers' models live in one
process group and take turns, so that other work on the machine slows both alike: read the ratios,
each of one round. "training" is forward, backward and step; "optimizer" is the call of the
optimizer's own ``step()``, messages and waiting included, and its "cpu" this thread's CPU time.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flora_dist import Flora
from tests.bench.wire_setups import Llama
from tests.conftest import launched_pool_of, pool_of

MODEL = "llama_900k_bytes"
SEQUENCES, LENGTH = 4, 128
ROUNDS, WARM_UP = 60, 5
CLOCKS = ("training", "optimizer", "cpu")
Times = dict[str, dict[str, list[float]]]
"""Seconds by optimizer and clock."""


@dataclass(eq=False)
class Run:
    """One model with its optimizer."""

    train: Callable[[Tensor], None]
    optimizer: torch.optim.Optimizer
    seconds: dict[str, list[float]] = field(default_factory=lambda: {c: [] for c in CLOCKS})
    profile: cProfile.Profile | None = None

    def __post_init__(self) -> None:
        step = self.optimizer.step

        def timed(*arguments: Any, **more: Any) -> Any:
            start, cpu = time.perf_counter(), time.thread_time()
            if self.profile is not None:
                self.profile.enable()
            result = step(*arguments, **more)
            if self.profile is not None:
                self.profile.disable()
            self.seconds["optimizer"].append(time.perf_counter() - start)
            self.seconds["cpu"].append(time.thread_time() - cpu)
            return result

        self.optimizer.step = timed  # type: ignore[method-assign]

    def once(self, tokens: Tensor) -> None:
        """A training step."""
        start = time.perf_counter()
        self.train(tokens)
        self.seconds["training"].append(time.perf_counter() - start)


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """As configs/llama_900k.yaml has them."""
    settings: dict[str, Any] = {"rank": 8, "block": 64, "momentum": "blend", "blend_gain": 2.0}
    settings["state_dtype"] = "float32"
    return {
        "AdamW": torch.optim.AdamW(model.named_parameters(), lr=1e-4, weight_decay=0.0),
        "Flora": Flora(model.named_parameters(), lr=1e-4, **settings),
    }


def zero2(name: str) -> Run:
    """An engine of ZeRO-2."""
    torch.manual_seed(0)
    model = Llama(MODEL, tokens=LENGTH)
    return engine_run(model, optimizers(model)[name], {"stage": 2})


def engine_run(model: nn.Module, own: torch.optim.Optimizer, zero: dict[str, Any]) -> Run:
    """An engine with these settings of ZeRO."""
    import deepspeed

    import flora_dist.deepspeed

    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Else DeepSpeed refuses, beside offload, every optimizer but its own.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    initialize = flora_dist.deepspeed.initialize if isinstance(own, Flora) else deepspeed.initialize
    engine, *_ = initialize(model=model, optimizer=own, config=config)

    def train(tokens: Tensor) -> None:
        engine.backward(engine(tokens))
        engine.step()

    return Run(train, own)


def fsdp2(name: str) -> Run:
    """Sharded by layers, and the rest."""
    torch.manual_seed(0)
    model = Llama(MODEL, tokens=LENGTH)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.network.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    own = optimizers(model)[name]

    def train(tokens: Tensor) -> None:
        model(tokens).backward()
        own.step()
        own.zero_grad()

    return Run(train, own)


LAYOUTS = {"zero-2": (zero2, launched_pool_of), "fsdp2": (fsdp2, pool_of)}


def measure(layout: str, rounds: int, profiles: bool) -> tuple[Times, str]:
    """On every rank: both optimizers in turns; and what Flora's ``step()`` calls."""
    runs = {name: LAYOUTS[layout][0](name) for name in ("AdamW", "Flora")}
    profile = cProfile.Profile()
    in_turns(runs, WARM_UP, words=256)
    if profiles:
        runs["Flora"].profile = profile
    times = in_turns(runs, rounds, words=256)
    text = io.StringIO()
    if profiles:
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(35)
    return times, text.getvalue()


def in_turns(runs: Mapping[str, Run], rounds: int, words: int) -> Times:
    """Seconds of so many training steps of each, on random tokens below ``words``."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for run in runs.values():
        run.seconds = {clock: [] for clock in CLOCKS}
    for _ in range(rounds):
        tokens = torch.randint(words, (SEQUENCES, LENGTH), generator=generator)
        for run in runs.values():
            dist.barrier()
            run.once(tokens)
    return {name: run.seconds for name, run in runs.items()}


def print_times(times: Times, base: str) -> None:
    """Median milliseconds by clock, and the ratio to ``base`` in one round with its quartiles."""
    for clock in CLOCKS:
        for name, seconds in times.items():
            pairs = zip(times[base][clock], seconds[clock], strict=True)
            low, middle, high = statistics.quantiles([own / other for other, own in pairs], n=4)
            print(
                f"  {clock:10} {name:18} {1e3 * statistics.median(seconds[clock]):9.2f} ms"
                f"  {middle:6.3f} x ({low:.3f} to {high:.3f})"
            )


def main() -> None:
    """Print a table for each layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--profile", action="store_true", help="where Flora's step spends its time")
    parsed = parser.parse_args()
    for layout in parsed.layouts.split(","):
        pool = LAYOUTS[layout][1](2)
        times, profile = pool(measure, layout, parsed.rounds, parsed.profile)[0]
        pool.close()
        print(f"{layout} x2, {MODEL}, median ms")
        print_times(times, base="AdamW")
        print(profile)


if __name__ == "__main__":
    # Ranks find a body by the name of its module, which must not be __main__.
    from tests.bench import sharded_step

    sharded_step.main()
