# SPDX-License-Identifier: Apache-2.0
"""The multi-process cases of one world size; run by support.Workers, one process per rank.

python -m tests.trainer.worker FOLDER CORPUS CASES
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from flora_dist.core.sketch.keys import canonical_name
from flora_dist.trainer import loop, summary
from flora_dist.trainer.backend import find_world, process_group, spread
from flora_dist.trainer.checkpoint import Position, Start, check_same_start
from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.loop import accumulate
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from flora_dist.trainer.traffic import Traffic
from tests.trainer.ragged import MICRO_BATCH, micro_batches, tiny_model, token_count
from tests.trainer.support import TINY, tiny_overrides

BACKENDS = {
    2: {name: [f"backend.name={name}"] for name in ("ddp", "fsdp1", "fsdp2")},
    4: {"hsdp": ["backend.name=hsdp", "backend.replicate=2", "backend.shard=2"]},
}

FLORA = ["optimizer={name: flora, lr: 1e-2, rank: 8}"]


# Of 64 tokens; the curves are those of whole logits.
CHUNKED = "model.loss_chunk=10"


def in_full(level: str) -> str:
    """Few bits are another run on another number of processes."""
    return (
        f"gradients.level={level}"
        if level == "dense"
        else f"gradients={{level: {level}, bits: 32}}"
    )


SKETCHED = {
    2: {
        f"{name}.{level}": [f"backend.name={name}", in_full(level)]
        + ([] if level == "fused" else [CHUNKED])
        for name, levels in {
            "ddp": ("compressed", "fused"),
            "fsdp2": ("dense", "sharded", "compressed", "fused"),
        }.items()
        for level in levels
    },
    4: {"hsdp.compressed": [*BACKENDS[4]["hsdp"], in_full("compressed")]},
}

LOW = "train.precision=bfloat16"
SAVING = "checkpoint={every: 2, keep: null}"
RESUMED = {
    "fsdp2": ["backend.name=fsdp2"],
    "ddp": [*FLORA, "backend.name=ddp", "checkpoint.asynchronous=true"],
    "fsdp1": [*FLORA, "backend.name=fsdp1"],
    "fsdp2.low": [*FLORA, "backend.name=fsdp2", LOW, "checkpoint.asynchronous=true"],
    "compressed": [*FLORA, "backend.name=fsdp2", "gradients.level=compressed"],
}


def trained(folder: Path, corpus: Path) -> None:
    """Every backend's gradient and run, and runs with sketched gradients; no pictures."""
    summary._draw = lambda *_: None
    size = int(os.environ["WORLD_SIZE"])
    for name, overrides in BACKENDS[size].items():
        config = load_config(
            TINY, tiny_overrides(corpus, folder, f"output.name={name}", *overrides)
        )
        gradients(config, folder / f"{name}.gradients.pt")
        assert run(config) == 0
    sketched = [*FLORA, "train.max_grad_norm=0.1"]
    for name, overrides in SKETCHED[size].items():
        every = tiny_overrides(corpus, folder, f"output.name={name}", *sketched, *overrides)
        assert run(load_config(TINY, every)) == 0
    if size == 2:
        fsdp2 = tiny_overrides(corpus, folder, "backend.name=fsdp2")
        clipped = [*fsdp2, "output.name=clipped", "train.max_grad_norm=0.1"]
        assert run(load_config(TINY, clipped)) == 0
        resting = ["backend={name: fsdp2, cpu_offload: true}", "gradients.level=dense", CHUNKED]
        every = tiny_overrides(corpus, folder, "output.name=offloaded", *sketched, *resting)
        assert run(load_config(TINY, every)) == 0


def saved(folder: Path, corpus: Path) -> None:
    """Runs that resume, or are asked to stop."""
    rank = int(os.environ["RANK"])
    for name, overrides in RESUMED.items():
        resumed(name, tiny_overrides(corpus, folder, SAVING, *overrides), folder)
    fsdp2 = tiny_overrides(corpus, folder, "backend.name=fsdp2")
    endless = [*fsdp2, "train.steps=100000", "checkpoint.every=100000"]
    for name, number in (("interrupted", signal.SIGINT), ("preempted", signal.SIGTERM)):
        code = stopped([*endless, f"output.name={name}"], folder / name, rank, number)
        (folder / f"{name}.{rank}").write_text(str(code))
    (folder / f"starts.{rank}").write_text(different_starts(load_config(TINY, fsdp2), rank))
    for name, every in (("nan.saving", 1), ("nan.between", 5)):
        saving = [f"checkpoint={{every: {every}}}", "train.log_every=100", "evaluation.every=100"]
        with nan_on_one_process(rank, step=4):
            code = run(load_config(TINY, [*fsdp2, f"output.name={name}", *saving]))
        (folder / f"{name}.{rank}").write_text(str(code))
    (folder / f"damaged.{rank}").write_text(damaged([*fsdp2, SAVING], folder / "damaged", rank))


def damaged(overrides: list[str], folder: Path, rank: int) -> str:
    """Go on where the second process's file of the newest checkpoint is damaged; what was said."""
    named = [*overrides, "output.name=damaged", "checkpoint.resume=auto"]
    assert run(load_config(TINY, [*named, "train.steps=4"])) == 0
    file = folder / "checkpoints" / "step-00000004" / "__1_0.distcp"
    if rank == 0:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = run(load_config(TINY, named))
    return f"{code} {[str(each.message) for each in caught]}"


def resumed(name: str, overrides: list[str], folder: Path) -> None:
    """Train whole, then from the second step on."""
    assert run(load_config(TINY, [*overrides, f"output.name={name}.whole"])) == 0
    checkpoint = folder / f"{name}.whole" / "checkpoints" / "step-00000002"
    again = [*overrides, f"output.name={name}.resumed", f"checkpoint.resume={checkpoint}"]
    assert run(load_config(TINY, again)) == 0


def different_starts(config: Config, rank: int) -> str:
    """What each process says if they have found checkpoints of different steps."""
    world = find_world(config.backend)
    try:
        with process_group(config.backend, world):
            check_same_start(Start(position=Position(step=10 * rank)), world)
    except ValueError as error:
        return str(error)
    return "nothing"


@contextmanager
def nan_on_one_process(rank: int, *, step: int) -> Iterator[None]:
    """The loss of a step, counted from 1, is NaN on process 1 alone; the gradient is sound."""
    accumulate, steps = loop.accumulate, count(1)

    def faulty(*arguments: Any) -> torch.Tensor:
        losses = accumulate(*arguments)
        return losses * torch.nan if next(steps) == step and rank == 1 else losses

    loop.accumulate = faulty
    try:
        yield
    finally:
        loop.accumulate = accumulate


def meet_at_files(folder: Path) -> None:
    """Let each process group of this program meet at a file of its own.

    Ports would have to be reserved for all of them beforehand, and another program may take one.
    """
    init, stores = dist.init_process_group, (folder / f"store.{n}" for n in count())

    def at_a_file(kind: str, timeout: timedelta) -> None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        where = next(stores).as_uri()
        init(kind, init_method=where, rank=rank, world_size=size, timeout=timeout)

    dist.init_process_group = at_a_file


def gradients(config: Config, path: Path) -> None:
    """Save the gradient of a ragged batch, the same without weights, and the bytes of the first."""
    world = find_world(config.backend)
    with process_group(config.backend, world):
        model = tiny_model(config)
        model_spread = spread(model, config, world)
        batches = micro_batches(world.process_rank, world.size)
        results = {}
        # DDP lays its buckets out anew in its second round, and tells the others how.
        for name in ("first", "second", "weighted"):
            model_spread.module.zero_grad()
            with Traffic() as traffic:
                accumulate(model_spread, batches, token_count(), world)
            results[name] = full_gradients(model_spread.module)
        model_spread.module.zero_grad()
        own_tokens = sum(int((labels >= 0).sum()) for _, labels in batches)
        # What a trainer that divides by its own count, and leaves the rest to averaging, does.
        alone = World(process_rank=world.process_rank, size=1, device=world.device)
        accumulate(model_spread, batches, own_tokens, alone)
        results["unweighted"] = full_gradients(model_spread.module)
        if world.speaks:
            torch.save({**results, "bytes_sent": traffic.bytes_sent}, path)
    assert len(batches) * MICRO_BATCH * world.size == 8


def full_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    with FullyShardedDataParallel.summon_full_params(module, with_grads=True):  # FSDP1's, if any
        return {
            canonical_name(name): (
                p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            )
            for name, p in module.named_parameters()
        }


def stopped(overrides: list[str], run_folder: Path, rank: int, number: signal.Signals) -> int:
    """Run without end; process 1 alone gets a signal once two steps are written, and again."""
    log = run_folder / "metrics.jsonl"

    def press() -> None:
        while not log.exists() or log.read_text().count("\n") < 2:
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), number)

    if rank == 1:
        threading.Thread(target=press, daemon=True).start()
    return run(load_config(TINY, overrides))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(270, exit=True)  # say where it hangs, and end
    meet_at_files(Path(sys.argv[1]))
    {"trained": trained, "saved": saved}[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2]))
