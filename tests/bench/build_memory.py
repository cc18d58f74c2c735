# SPDX-License-Identifier: Apache-2.0
"""Prints the peak of resident memory of a trainer's process while its network comes to be.

    python -m tests.bench.build_memory --model llama_130m --processes 2
    python -m tests.bench.build_memory --model llama_130m --processes 2 --start pretrained
    python -m tests.bench.build_memory --model llama_130m --processes 2 --backend zero3

Under FSDP2 or ZeRO-3 with gloo, above what a process has once the libraries are loaded: the whole
network in each process, as the trainer builds it where it must, and parts alone. The most of all
processes. With `pretrained`, weights come from a folder of bfloat16 safetensors, else they are
drawn.
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

_WAYS = ("whole", "parts")
_OWN = ("optimizer", "train_micro_batch_size_per_gpu", "bf16", "gradient_clipping")
_ZERO3 = (
    f"{{name: deepspeed, config: {MODELS.parent / 'deepspeed' / 'zero3.json'}, "
    f"changes: {{{', '.join(f'{key}: null' for key in _OWN)}}}}}"
)
_BACKENDS = {"fsdp2": "{name: fsdp2}", "zero3": _ZERO3}
_PORT = 29621
_SEED = 0


def main() -> None:
    """Prints a table, or measures one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_130m")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--start", choices=("drawn", "pretrained"), default="drawn")
    parser.add_argument("--backend", choices=tuple(_BACKENDS), default="fsdp2")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way is not None:
        measure(asked.model, asked.precision, asked.way, asked.folder, asked.backend)
        return
    with tempfile.TemporaryDirectory() as folder:
        if asked.start == "pretrained":
            save(asked.model, folder)
        weights = folder if asked.start == "pretrained" else ""
        _table(asked.model, asked.processes, weights, asked.backend)


def save(model: str, folder: str) -> None:
    """A network in bfloat16, as `save_pretrained` writes it."""
    import torch
    from transformers import AutoModelForCausalLM

    from flora_dist.trainer.model import read_network

    network = read_network(MODELS / f"{model}.json")
    made = AutoModelForCausalLM.from_config(network, dtype=torch.bfloat16)
    made.save_pretrained(folder)


def _table(model: str, processes: int, folder: str, backend: str) -> None:
    kind = "loaded" if folder else "drawn"
    print(f"| network, processes, weights | parameters | {kind} | peak | left |")
    print("|---|---|---|---|---|")
    for precision in ("float32", "bfloat16-pure"):
        for way in _WAYS:
            found = run(model, processes, precision, way, folder, backend)
            sizes = " | ".join(f"{found[name] / MEBI:,.0f}" for name in ("peak", "left"))
            name = f"{model}, {backend} x{processes}, {precision}"
            print(f"| {name} | {found['parameters']:,} | {way} | {sizes} |", flush=True)


def run(
    model: str, processes: int, precision: str, way: str, weights: str, backend: str
) -> dict[str, int]:
    """The most of each number over the processes, bytes; ``weights``: their folder, or empty."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.build_memory", "--model", model]
        command += ["--precision", precision, "--way", way, "--folder", weights]
        command += ["--backend", backend]
        running = []
        for rank in range(processes):
            told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            told |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
            told |= {"MASTER_PORT": str(_PORT), "OUT": f"{folder}/{rank}.json"}
            told |= {"MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu"}
            running.append(  # DeepSpeed prints that it has compiled its helper
                subprocess.Popen(command, env={**os.environ, **told}, stdout=subprocess.DEVNULL)
            )
        for process in running:
            if process.wait(TIMEOUT_SECONDS):
                raise RuntimeError(f"{way} must end with 0; it ended with {process.returncode}.")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    return {name: max(each[name] for each in found) for name in found[0]}


def measure(model: str, precision: str, way: str, weights: str, backend: str) -> None:
    """Build as the trainer does, and write the peak."""
    import torch.distributed as dist

    from flora_dist.trainer.backend import find_world
    from flora_dist.trainer.by_rows import draw_rows
    from flora_dist.trainer.configfile import load_config
    from flora_dist.trainer.engine import build_learner
    from flora_dist.trainer.model import build_model, read_network, weight_dtype
    from flora_dist.trainer.new_network import new_network
    from flora_dist.trainer.place import WHOLE

    dist.init_process_group("gloo")
    if backend == "zero3":
        __import__("deepspeed")
    source = f"{{pretrained: {weights}}}" if weights else f"{{config: {MODELS / model}.json}}"
    told = [f"model={source}", f"train.precision={precision}", f"train.seed={_SEED}"]
    told += [f"backend={_BACKENDS[backend]}", "optimizer={name: flora, lr: 1e-3}"]
    told += ["train.micro_batch=1"]  # up to 8 processes share the global batch
    config = load_config(MODELS.parent / "tiny.yaml", told)
    world, dtype = find_world(config.backend), weight_dtype(config.train)
    small = read_network(MODELS / "llama_tiny.json")
    draw_rows(small, WHOLE, seed=_SEED, dtype=dtype)  # loads the network's code
    network, before = read_network(MODELS / f"{model}.json"), resident("VmRSS")
    forget_peak()
    if way == "parts":
        built, rows = new_network(config, network, world, print)
        assert rows is not None
    else:
        built, rows = build_model(config.model, network, seed=_SEED, dtype=dtype), None
    parameters = sum(p.numel() for p in built.parameters())
    learner = build_learner(built, config.optimizer, config, world, rows)
    found = {"parameters": parameters, "peak": resident("VmHWM") - before}
    found["left"] = resident("VmRSS") - before
    Path(os.environ["OUT"]).write_text(json.dumps(found))
    del learner
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
