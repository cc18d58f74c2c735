# SPDX-License-Identifier: Apache-2.0
"""Time, state and memory of ``step()`` beside optimizers of other packages, in one run.

    python -m tests.bench.peers --install
    python -m tests.bench.peers --threads 1 --clock thread --only llama-60m --dtype float32

``--install`` makes the environment ``.cache/peers`` once: it borrows torch and DeepSpeed from the
one that runs this, installs each package beside them, and lets DeepSpeed compile its CPU Adam,
which takes minutes. None of it is a dependency of this package, and nothing of it is copied here:
peers are used by their public names, with what their papers or documents recommend.

Shapes, rounds, clocks and the ratio to fused AdamW are those of tests/bench/step.py. A peer that
is not installed, or whose first step fails on a CPU, has a row that says why. The first run
compiles what torchao leaves to torch.compile, a minute or more for each set of shapes; that too is
kept in ``.cache/peers``. "state" is bytes kept per parameter, after the run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.step import (
    CLOCKS,
    LAYER_7B,
    SHAPES,
    Shapes,
    Stepped,
    begin,
    give,
    optimizers_of,
    options,
    run,
    told,
)

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".cache" / "peers"
PYTHON = HOME / "venv" / "bin" / "python"
PACKAGES = ("torchao", "bitsandbytes", "flora-opt", "galore-torch", "apollo-torch", "flashoptim")
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _called(module: str, name: str, **settings: object) -> Make:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(
            parameters, lr=1e-5, **settings
        )
        return made

    return make


def _projected(module: str, name: str, **group: object) -> Make:
    """Matrices in a group of their own, which says how they are projected."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        matrices = [each for each in parameters if each.ndim == 2]
        others = [each for each in parameters if each.ndim != 2]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": matrices, **group}]
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(
            [each for each in groups if each["params"]], lr=1e-5
        )
        return made

    return make


# Rank 16 of 128 columns is about as much state as rank 8 of blocks of 64.
PEERS: Mapping[str, Make] = {
    "DeepSpeedCPUAdam": _called("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    "AdamW 8-bit (torchao)": _called("torchao.optim", "AdamW8bit"),
    "AdamW 4-bit (torchao)": _called("torchao.optim", "AdamW4bit"),
    "AdamW 8-bit (bitsandbytes)": _called("bitsandbytes.optim", "AdamW8bit"),
    "FlashAdamW (flashoptim)": _called("flashoptim", "FlashAdamW"),
    "GaLore AdamW": _projected(
        "galore_torch", "GaLoreAdamW", rank=16, update_proj_gap=200, scale=0.25, proj_type="std"
    ),
    "APOLLO AdamW": _projected(
        "apollo_torch",
        "APOLLOAdamW",
        rank=16,
        proj="random",
        scale_type="channel",
        scale=1.0,
        update_proj_gap=200,
        proj_type="std",
    ),
    "Flora (flora-opt)": _called(
        "flora_opt.optimizers.torch.flora", "Flora", rank=16, beta1=0.9, scale_parameter=False
    ),
}
# By peer and title of the shapes.
LEFT_OUT = {
    ("GaLore AdamW", LAYER_7B): "its first step decomposes seven matrices, minutes of a CPU each"
}


def install() -> None:
    """Make the environment, or add what it lacks; what pip or a compiler says is printed."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(HOME / "venv")], check=True)
    lines = [path for path in sys.path if path.endswith("site-packages")]
    for folder in (HOME / "venv" / "lib").glob("python*/site-packages"):
        (folder / "borrowed.pth").write_text("\n".join(lines) + "\n")
    # A peer that asks for another torch than the one measured is not installed.
    kept = HOME / "constraints.txt"
    kept.write_text(f"torch=={torch.__version__}\n")
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for package in PACKAGES:
        done = subprocess.run([*pip, "--constraint", str(kept), package], check=False)
        print(f"{package}: {'installed' if done.returncode == 0 else 'NOT INSTALLED'}", flush=True)
    compile_cpu_adam(str(PYTHON))


def compile_cpu_adam(python: str) -> int:
    """Let DeepSpeed compile its CPU Adam where the tests keep such things; the exit code."""
    # In one process, before any other waits for the lock that the compilation takes.
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load(verbose=True)"
    done = subprocess.run([python, "-c", code], env=environment(0), check=False)
    print(f"DeepSpeedCPUAdam: {'compiled' if done.returncode == 0 else 'NOT COMPILED'}")
    return done.returncode


def environment(threads: int) -> dict[str, str]:
    """Variables of a process that may compile or load what is kept; 0 threads: as many as now."""
    kept = {
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(HOME / "inductor"),
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    # DeepSpeed's kernels bring an OpenMP of their own, which torch.set_num_threads does not reach.
    return {**os.environ, **kept, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


def tried(
    title: str, parameters: list[nn.Parameter], names: Iterable[str]
) -> tuple[dict[str, Stepped], dict[str, str]]:
    """The peers that have made a step with these parameters, and why the others have not."""
    made: dict[str, Stepped] = {}
    missing = {}
    gradients = [(each, each.grad) for each in parameters if each.grad is not None]
    for name in names:
        if (name, title) in LEFT_OUT:
            missing[name] = LEFT_OUT[name, title]
            continue
        give(gradients)
        try:
            peer = PEERS[name](parameters)
            peer.step()
        # Whatever a package raises on a machine it was not made for is what its row says.
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            missing[name] = f"{type(error).__name__}: {said[0]}"
        else:
            made[name] = peer, "torch"
    return made, missing


def state_bytes(value: object) -> int:
    """Of the tensors in it, through containers, objects and torch's wrapper subclasses."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            return sum(state_bytes(getattr(value, name)) for name in names)
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(state_bytes(each) for each in value.values())
    if isinstance(value, list | tuple):
        return sum(state_bytes(each) for each in value)
    return state_bytes(vars(value)) if hasattr(value, "__dict__") else 0


def compare(title: str, shapes: Shapes, dtype: str, asked: argparse.Namespace) -> None:
    """Print one table and its line of JSON."""
    made: dict[str, Stepped] = {}
    missing: dict[str, str] = {}

    def make(parameters: list[nn.Parameter]) -> dict[str, Stepped]:
        peers, reasons = tried(title, parameters, asked.peers.split(","))
        missing.update(reasons)
        made.update(optimizers_of(parameters, ["native"]) | peers)
        return made

    rows = run(shapes, getattr(torch, dtype), asked.rounds, CLOCKS[asked.clock], make)
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    for name, (optimizer, _) in made.items():
        rows[name]["state"] = state_bytes(optimizer.state) / numbers
    print(f"\n{title}, {dtype}")
    for name, row in rows.items():
        print(f"  {name:28} {told(row)}  state {row['state']:5.2f} B")
    for name, reason in missing.items():
        print(f"  {name:28} not measured: {reason}")
    found = {"shapes": title, "dtype": dtype, "threads": asked.threads, "rows": rows}
    print(json.dumps({**found, "not measured": missing}), flush=True)


def main() -> int:
    """Install, or measure: in the peers' environment, which this starts anew in."""
    parser = options(__doc__)
    parser.add_argument("--peers", default=",".join(PEERS), help="some of them, with commas")
    parser.add_argument("--install", action="store_true", help="make the environment, and end")
    asked = parser.parse_args()
    if asked.install:
        install()
        return 0
    if not PYTHON.exists():
        print(f"the peers' environment {HOME} is not there. Make it: --install", file=sys.stderr)
        return 2
    if Path(sys.prefix) != HOME / "venv":
        words = [str(PYTHON), "-W", "ignore", "-m", "tests.bench.peers", *sys.argv[1:]]
        return subprocess.run(
            words, env=environment(asked.threads), cwd=ROOT, check=False
        ).returncode
    begin(asked)
    for title, shapes in SHAPES.items():
        if asked.only in title:
            for dtype in asked.dtype or ["float32", "bfloat16"]:
                compare(title, shapes, dtype, asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
