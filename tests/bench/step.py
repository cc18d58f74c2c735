# SPDX-License-Identifier: Apache-2.0
"""Time and memory of ``step()`` beside torch's optimizers and others, on the shapes of models.

    python -m tests.bench.step --threads 1
    python -m tests.bench.step --only 60m --clock thread --peers all

Peers are measured where they can be imported. To install them beside this environment, not in it:
pip install --no-deps --target FOLDER torchao bitsandbytes galore-torch apollo-torch, and
PYTHONPATH=FOLDER.

Interleaved in one process, so that all meet the same other work on the machine; medians with
quartiles: read the ratios. ``--clock thread`` counts this thread's CPU time, which other work
disturbs less; with one thread only. One table and one line of JSON for each set of shapes and
dtype.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_dist import Flora
from flora_dist.kernels.library import found
from tests.kernels.paths import path

ROUNDS = 15
BASE = "AdamW (torch, fused)"
Shapes = Sequence[tuple[int, ...]]
Stepped = tuple[torch.optim.Optimizer, str]
"""An optimizer, and the path of kernels that it steps by."""
SMALL = [(128, 128)] * 16 + [(352, 128)] * 8 + [(128, 352)] * 4 + [(256, 128)] * 2
LARGE = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
SHAPES: dict[str, Shapes] = {
    "llama-9m, 39 tensors": [*SMALL, *[(128,)] * 9],
    "llama-60m, 75 tensors": [*LARGE * 8, (32000, 512), (32000, 512), *[(512,)] * 17],
    "llama-7b, one layer": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
    "64 experts of 256 x 128": [(64, 256, 128)],
    "75 tensors of 512 numbers": [(8, 64)] * 75,
    "500 tensors of 64 numbers": [(8, 8)] * 500,
}
LAYER_7B = "llama-7b, one layer"
RULES = ("blend", "none", "flora", "flora_strict")
# Not ours to depend on: measured where whoever runs this has installed them.
PEERS = {
    "DeepSpeedCPUAdam": ("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    "AdamW 8-bit (torchao)": ("torchao.optim", "AdamW8bit"),
    "AdamW 4-bit (torchao)": ("torchao.optim", "AdamW4bit"),
    "AdamW 8-bit (bitsandbytes)": ("bitsandbytes.optim", "AdamW8bit"),
    "GaLore AdamW": ("galore_torch", "GaLoreAdamW"),
    "APOLLO AdamW": ("apollo_torch", "APOLLOAdamW"),
    "Flora (flora-opt)": ("flora_opt.optimizers.torch.flora", "Flora"),
}
# What their papers keep of a matrix, at a rank whose state is about that of rank 8 of 64 here.
PROJECTED: dict[str, dict[str, object]] = {
    "GaLore AdamW": {"rank": 16, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "APOLLO AdamW": {
        "rank": 16,
        "proj": "random",
        "scale_type": "channel",
        "scale": 1.0,
        "update_proj_gap": 200,
        "proj_type": "std",
    },
}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}


def optimizers_of(
    parameters: list[nn.Parameter], peers: Sequence[str], paths: Sequence[str]
) -> dict[str, Stepped]:
    """By name; Flora's by each of these paths of kernels."""
    named = [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]
    made: dict[str, Stepped] = {
        BASE: (torch.optim.AdamW(parameters, lr=1e-5, fused=True), "torch"),
        "AdamW (torch, foreach)": (torch.optim.AdamW(parameters, lr=1e-5, foreach=True), "torch"),
        "Adafactor (torch)": (torch.optim.Adafactor(parameters, lr=1e-5), "torch"),
    }
    for name in peers:
        peer = _peer(name, parameters)
        if peer is not None:
            made[name] = peer, "torch"
    for kernels in paths:
        for rule in RULES:
            optimizer = Flora(named, lr=1e-5, momentum=rule, rank=8, block=64)
            made[f"Flora, {rule}, {kernels}"] = optimizer, kernels
        default = Flora(named, lr=1e-5)
        made[f"Flora, default, {kernels}"] = default, kernels
    return made


def _peer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    module, attribute = PEERS[name]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        print(f"skipped: {name}: {module.partition('.')[0]} is not installed")
        return None
    try:
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), attribute)(
            _groups(name, parameters), lr=1e-5
        )
    except Exception as error:
        print(f"skipped: {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return None
    return made


def _groups(name: str, parameters: list[nn.Parameter]) -> list[Any]:
    """Matrices in a group of their own where a peer has to be told what to project."""
    if name not in PROJECTED:
        return parameters
    matrices = [each for each in parameters if each.ndim == 2]
    others = [each for each in parameters if each.ndim != 2]
    return [{"params": others}, {"params": matrices, **PROJECTED[name]}]


def measure(
    optimizers: dict[str, Stepped], rounds: int, clock: Callable[[], float]
) -> Iterator[dict[str, float]]:
    """Seconds of each round's step, by optimizer."""
    for optimizer, name in optimizers.values():
        with path(name):
            optimizer.step()
            optimizer.step()
    for _ in range(rounds):
        seconds = {}
        for name, (optimizer, _) in optimizers.items():
            start = clock()
            optimizer.step()
            seconds[name] = clock() - start
        yield seconds


def extra_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What one step takes of memory beyond what is resident before it, at its peak."""
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    optimizer.step()
    return max(0, _status("VmHWM") - resident)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have a line {field}; it has none. Use Linux.")


def table(
    rounds: Sequence[dict[str, float]], extra: dict[str, int], weights: int
) -> dict[str, dict[str, float]]:
    """Milliseconds: median and least; quartiles of the ratio to fused AdamW of the same round."""
    rows = {}
    for name in rounds[0]:
        own = [seconds[name] for seconds in rounds]
        ratios = [seconds[name] / seconds[BASE] for seconds in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ms": 1e3 * statistics.median(own),
            "least_ms": 1e3 * min(own),
            "ratio": middle,
            "low": low,
            "high": high,
            "extra": extra[name] / weights,
        }
    return rows


def run(
    shapes: Shapes, dtype: torch.dtype, asked: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The table of one set of shapes."""
    torch.manual_seed(0)
    parameters = [nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    weights = sum(each.numel() * each.element_size() for each in parameters)
    peers = list(PEERS) if asked.peers == "all" else [p for p in asked.peers.split(",") if p]
    optimizers = optimizers_of(parameters, peers, asked.paths.split(","))
    seconds = list(measure(optimizers, asked.rounds, CLOCKS[asked.clock]))
    extra = {name: extra_bytes(optimizer) for name, (optimizer, _) in optimizers.items()}
    return table(seconds, extra, weights)


def main() -> None:
    """Print one table for each set of shapes and dtype, and all of them as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", default="", help="shapes whose title holds this")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--peers", default="", help="names of peers, with commas; or all")
    parser.add_argument("--paths", default="native,torch", help="of kernels, with commas")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    print(f"torch {torch.__version__}, {parsed.threads} threads, kernels: {found().said}")
    print(f"{parsed.clock} clock, {parsed.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for title, shapes in SHAPES.items():
        # Nine optimizers on one layer of 7b take 16 GB in float32: only where it is asked for.
        if parsed.only not in title or (title == LAYER_7B and not parsed.only):
            continue
        for dtype in parsed.dtype or ["float32", "bfloat16"]:
            rows = run(shapes, getattr(torch, dtype), parsed)
            print(f"\n{title}, {dtype}")
            for name, row in rows.items():
                spread = f"{row['low']:.2f} to {row['high']:.2f}"
                print(
                    f"  {name:28} {row['ms']:9.2f} ms {row['ratio']:7.2f} x ({spread})"
                    f"  memory of a step {100 * row['extra']:5.1f} %"
                )
            print(json.dumps({"shapes": title, "dtype": dtype, "rows": rows}))


if __name__ == "__main__":
    main()
