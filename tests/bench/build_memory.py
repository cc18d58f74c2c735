# SPDX-License-Identifier: Apache-2.0
"""Prints the peak of resident memory of a trainer's process while its network comes to be.

    python -m tests.bench.build_memory --model llama_130m --processes 2

Under FSDP2 with gloo, above what a process has once the libraries are loaded: the whole network in
each process, as the trainer draws it where it must, and rows alone. The most of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.process_memory import MEBI, TIMEOUT_SECONDS, forget_peak, resident
from tests.bench.process_plan import MODELS

_WAYS = ("whole", "rows")
_PORT = 29621


def main() -> None:
    """Prints a table, or measures one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_130m")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way is not None:
        measure(asked.model, asked.precision, asked.way)
        return
    print(
        "| network, processes, weights | parameters | drawn | peak | left |\n|---|---|---|---|---|"
    )
    for precision in ("float32", "bfloat16-pure"):
        for way in _WAYS:
            found = run(asked.model, asked.processes, precision, way)
            sizes = " | ".join(f"{found[name] / MEBI:,.0f}" for name in ("peak", "left"))
            name = f"{asked.model}, {asked.processes}, {precision}"
            print(f"| {name} | {found['parameters']:,} | {way} | {sizes} |", flush=True)


def run(model: str, processes: int, precision: str, way: str) -> dict[str, int]:
    """The most of each number over the processes, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.build_memory", "--model", model]
        command += ["--precision", precision, "--way", way]
        running = []
        for rank in range(processes):
            told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            told |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
            told |= {"MASTER_PORT": str(_PORT), "OUT": f"{folder}/{rank}.json"}
            told |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
            running.append(subprocess.Popen(command, env={**os.environ, **told}))
        for process in running:
            if process.wait(TIMEOUT_SECONDS):
                raise RuntimeError(f"{way} must end with 0; it ended with {process.returncode}.")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    return {name: max(each[name] for each in found) for name in found[0]}


def measure(model: str, precision: str, way: str) -> None:
    """Build as the trainer does, and write the peak."""
    import torch.distributed as dist

    from flora_dist.trainer.backend import find_world
    from flora_dist.trainer.by_rows import draw_rows, place_in
    from flora_dist.trainer.configfile import load_config
    from flora_dist.trainer.engine import build_learner
    from flora_dist.trainer.model import build_model, read_network, weight_dtype

    dist.init_process_group("gloo")
    told = [f"model.config={MODELS / f'{model}.json'}", f"train.precision={precision}"]
    told += ["backend.name=fsdp2", "optimizer={name: flora, lr: 1e-3}"]
    config = load_config(MODELS.parent / "tiny.yaml", told)
    world, dtype = find_world(config.backend), weight_dtype(config.train)
    place = place_in(config, world)
    assert place is not None
    small = read_network(MODELS / "llama_tiny.json")
    draw_rows(small, place, seed=0, dtype=dtype)  # loads the network's code
    network, before = read_network(MODELS / f"{model}.json"), resident("VmRSS")
    forget_peak()
    if way == "rows":
        drawn = draw_rows(network, place, seed=0, dtype=dtype)
        parameters = sum(p.numel() for p in drawn.model.parameters())
        learner = build_learner(drawn.model, config.optimizer, config, world, drawn.rows)
    else:
        whole = build_model(config.model, network, seed=0, dtype=dtype)
        parameters = sum(p.numel() for p in whole.parameters())
        learner = build_learner(whole, config.optimizer, config, world)
    found = {"parameters": parameters, "peak": resident("VmHWM") - before}
    found["left"] = resident("VmRSS") - before
    Path(os.environ["OUT"]).write_text(json.dumps(found))
    del learner
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
