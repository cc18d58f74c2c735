# SPDX-License-Identifier: Apache-2.0
"""Prints what the operating system gives to a training process, phase by phase, and the plan.

    python -m tests.bench.process_memory                      all rows, in markdown
    python -m tests.bench.process_memory --model llama_130m --only zero2
    python -m tests.bench.process_memory --only 'one, adamw'

Each row is a new process, or two with gloo. Its peak of resident memory (VmHWM, set back before
each phase) is taken above what it had before the model was built, when another had trained a step:
libraries do not count, whatever an allocator rounds up or keeps does. Steps of 4 micro-batches (1
where a row says so) of 1 x 128 tokens with checkpointing of activations; the third is measured.
The plan's total has every category at its most at once. AdamW in 8 bits is torchao's and that of
bitsandbytes, in the environment of tests/bench/peers.py, where that has been made; what is compiled
for the model's shapes is loaded before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench import peers
from tests.bench.process_plan import BUCKET, MODELS, PACKAGES, PROCESSES, Row, planned, rows

STEPS, TOKENS = 3, 128
MEBI = 2**20
TIMEOUT_SECONDS = 900.0
_PORT = 29611
_LIBRARIES = ("transformers", "flora_dist", "torch._dynamo")
_OF_ZERO = ("deepspeed", "deepspeed.runtime.zero.muon.original_muon")
"""``deepspeed.initialize`` imports the last, whose ``torch.compile`` loads torch's inductor."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How a row's training goes on."""

    loss: Callable[[Any, bool], Any]
    backward: Callable[[Any, bool], None]
    step: Callable[[], None]


def main() -> None:
    """Prints the table, or measures one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--only", default="", help="rows whose name begins so; several: '; '")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row is not None:
        measure(Row(**json.loads(asked.row)))
        return
    print("| row | built | in backward | in step | peak | a parameter | planned |")
    print("|---|---|---|---|---|---|---|")
    for row in rows(asked.model):
        if not str(row).startswith(tuple(asked.only.split("; "))):
            continue
        if row.optimizer in PACKAGES and not peers.PYTHON.exists():
            print(f"| {row} | not measured: python -m tests.bench.peers --install |" + " |" * 5)
            continue
        print(line(row, run(row)), flush=True)


def line(row: Row, found: dict[str, int]) -> str:
    """Mebibytes above the libraries', of the process that has most."""
    peak = max(found["backward"], found["step"])
    cells = [found["built"], found["backward"], found["step"], peak]
    text = [f"{size / MEBI:,.0f}" for size in cells]
    total = planned(row)
    text += [f"{peak / found['parameters']:.2f}", f"{total / MEBI:,.0f}" if total else ""]
    return f"| {row} | {' | '.join(text)} |"


def run(row: Row) -> dict[str, int]:
    """The most of each number over the row's processes."""
    with tempfile.TemporaryDirectory() as folder:
        python, environment = sys.executable, dict(os.environ)
        if row.optimizer in PACKAGES:
            python, environment = str(peers.PYTHON), peers.environment(threads=1)
        command = [python, "-m", "tests.bench.process_memory", "--row", row.as_json()]
        running = []
        for rank in range(PROCESSES[row.backend]):
            told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            told |= {"WORLD_SIZE": str(PROCESSES[row.backend]), "MASTER_ADDR": "127.0.0.1"}
            told |= {"MASTER_PORT": str(_PORT), "OUT": f"{folder}/{rank}.json"}
            # glibc gives large blocks back to the system as soon as they are freed.
            told |= {"MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu"}
            running.append(
                subprocess.Popen(command, env=environment | told, stdout=subprocess.DEVNULL)
            )
        for process in running:
            if process.wait(TIMEOUT_SECONDS):
                raise RuntimeError(f"{row} must end with 0; it ended with {process.returncode}.")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    return {name: max(each[name] for each in found) for name in found[0]}


# ---- in a process


def measure(row: Row) -> None:
    """Train, and write the peak of each phase."""
    import torch.distributed as dist

    if PROCESSES[row.backend] > 1:
        dist.init_process_group("gloo")
    for module in (*_LIBRARIES, *(_OF_ZERO if row.backend.startswith("zero") else ())):
        __import__(module)
    _warm_up(row)
    before = resident("VmRSS")
    model = _model(row)
    numel = sum(parameter.numel() for parameter in model.parameters())
    loop = _BACKENDS[row.backend](row, model)
    found = {"parameters": numel, "built": resident("VmRSS") - before}
    for step in range(STEPS):
        forget_peak()
        for loss, is_last in _losses(loop, row, step):
            loop.backward(loss, is_last)
        found["backward"] = resident("VmHWM") - before
        forget_peak()
        loop.step()
        found["step"] = resident("VmHWM") - before
    Path(os.environ["OUT"]).write_text(json.dumps(found))


def _warm_up(row: Row) -> None:
    """Load what a first forward, backward and step load; all of it is of the libraries."""
    import torch

    small = replace(row, model="llama_tiny", backend="one", optimizer="flora", steps="after")
    loop = _own_loop(small, _model(small))
    for loss, is_last in _losses(loop, small, 0, words=200, tokens=16):
        loop.backward(loss, is_last)
    loop.step()
    if row.optimizer in PACKAGES:  # what is compiled for its shapes is of the libraries too
        alone = _model(row)
        for parameter in alone.parameters():
            parameter.grad = torch.zeros_like(parameter)
        _optimizer(row, alone).step()
        del alone, parameter
        gc.collect()


def _losses(
    loop: Loop, row: Row, step: int, words: int = 32000, tokens: int = TOKENS
) -> Iterator[tuple[Any, bool]]:
    import torch

    generator = torch.Generator().manual_seed(1000 * step + int(os.environ["RANK"]))
    for number in range(1, row.micro_batches + 1):
        inputs = torch.randint(words, (1, tokens), generator=generator)
        is_last = number == row.micro_batches
        yield loop.loss(inputs, is_last), is_last


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have {name}; it has not. Run it on Linux.")


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _model(row: Row) -> Any:
    import torch
    from torch import nn

    from tests.planner.runs import build

    model: nn.Module = build(MODELS / f"{row.model}.json")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if row.precision == "bfloat16-pure":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _optimizer(row: Row, model: Any) -> Any:
    import torch

    from flora_dist import Flora

    if row.optimizer == "flora":
        return Flora(model.named_parameters(), lr=1e-3, rank=4, block=64)
    if row.optimizer in PACKAGES:
        return peers.PEERS[PACKAGES[row.optimizer]](list(model.parameters()))
    kinds = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}
    return kinds[row.optimizer](model.parameters(), lr=1e-3)


def _own_loop(row: Row, model: Any) -> Loop:
    import torch
    from torch.distributed.fsdp import FSDPModule

    import flora_dist
    from tests.planner.runs import loss_of

    optimizer = _optimizer(row, model)
    if row.gradients != "dense":
        flora_dist.attach(model, optimizer, row.gradients, gradient_bits=row.bits)
    handle = flora_dist.step_in_backward(model, optimizer) if row.steps == "within" else None
    is_sharded = isinstance(model, FSDPModule)
    lowered = row.precision == "bfloat16" and not is_sharded

    def loss(tokens: Any, is_last: bool) -> Any:
        if is_sharded:
            model.set_requires_gradient_sync(is_last or row.gradients == "sharded")
        with torch.autocast("cpu", dtype=torch.bfloat16) if lowered else nullcontext():
            return loss_of(model, tokens) / row.micro_batches

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def backward(loss: Any, is_last: bool) -> None:
        with nullcontext() if handle is None or is_last else handle.accumulating():
            loss.backward()

    return Loop(loss=loss, backward=backward, step=step)


def _fsdp2(row: Row, model: Any) -> Loop:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES[row.backend],))
    low = torch.bfloat16 if row.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return _own_loop(row, model)


def _zero(row: Row, model: Any) -> Loop:
    import deepspeed

    import flora_dist.deepspeed
    from tests.planner.runs import loss_of

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": row.micro_batches,
        "zero_optimization": {
            "stage": int(row.backend[-1]),
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "bf16": {
            "enabled": True,
            "bf16_master_weights_and_grads": row.precision == "bfloat16-pure",
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if row.gradients != "dense":
        config["flora"] = {"gradients": row.gradients, "gradient_bits": row.bits}
    start = flora_dist.deepspeed if row.optimizer == "flora" else deepspeed
    engine, *_ = start.initialize(model=model, optimizer=_optimizer(row, model), config=config)

    def backward(loss: Any, is_last: bool) -> None:
        engine.backward(loss)
        if not is_last:
            engine.step()  # counts the micro-batch

    return Loop(loss=lambda tokens, _: loss_of(engine, tokens), backward=backward, step=engine.step)


_BACKENDS = {"one": _own_loop, "fsdp2": _fsdp2, "zero1": _zero, "zero2": _zero, "zero3": _zero}


if __name__ == "__main__":
    main()
