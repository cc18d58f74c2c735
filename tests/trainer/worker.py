# SPDX-License-Identifier: Apache-2.0
"""The multi-process cases of one world size; run by support.Workers, one process per rank.

python -m tests.trainer.worker FOLDER CORPUS
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from flora_dist.sketch.keys import canonical_name
from flora_dist.trainer.backend import find_world, process_group, spread
from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.loop import accumulate
from flora_dist.trainer.run import run
from flora_dist.trainer.spread import World
from flora_dist.trainer.traffic import Traffic
from tests.trainer.ragged import MICRO_BATCH, micro_batches, tiny_model, token_count
from tests.trainer.support import TINY, tiny_overrides

BACKENDS = {
    2: {name: [f"backend.name={name}"] for name in ("ddp", "fsdp1", "fsdp2")},
    4: {"hsdp": ["backend.name=hsdp", "backend.replicate=2", "backend.shard=2"]},
}

FLORA = ["optimizer={name: flora, lr: 1e-2}"]
SKETCHED = {
    2: {
        f"{name}.{level}": [f"backend.name={name}", f"gradients.level={level}"]
        for name, levels in {
            "ddp": ("compressed", "fused"),
            "fsdp2": ("dense", "sharded", "compressed", "fused"),
        }.items()
        for level in levels
    },
    4: {"hsdp.compressed": [*BACKENDS[4]["hsdp"], "gradients.level=compressed"]},
}


def main(folder: Path, corpus: Path) -> None:
    meet_at_files(folder)
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
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
        half = [*fsdp2, "output.name=resumed", "checkpoint.every=2"]
        assert run(load_config(TINY, half)) == 0
        checkpoint = folder / "resumed" / "checkpoints" / "step-00000002"
        assert run(load_config(TINY, [*half, f"checkpoint.resume={checkpoint}"])) == 0
        half = [*fsdp2, *sketched, "gradients.level=compressed", "checkpoint.every=2"]
        half.append("output.name=compressed.resumed")
        assert run(load_config(TINY, half)) == 0
        checkpoint = folder / "compressed.resumed" / "checkpoints" / "step-00000002"
        assert run(load_config(TINY, [*half, f"checkpoint.resume={checkpoint}"])) == 0
        code = interrupted([*fsdp2, "output.name=interrupted", "train.steps=100000"], folder, rank)
        (folder / f"interrupted.{rank}").write_text(str(code))


def meet_at_files(folder: Path) -> None:
    """Let each process group of this program meet at a file of its own.

    Ports would have to be reserved for all of them beforehand, and another program may take one.
    """
    init, stores = dist.init_process_group, (folder / f"store.{n}" for n in count())

    def at_a_file(kind: str) -> None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        init(kind, init_method=next(stores).as_uri(), rank=rank, world_size=size)

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


def interrupted(overrides: list[str], folder: Path, rank: int) -> int:
    """Run without end; process 1 alone gets a Ctrl-C once two steps are written."""
    log = folder / "interrupted" / "metrics.jsonl"

    def press() -> None:
        while not log.exists() or log.read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    if rank == 1:
        threading.Thread(target=press, daemon=True).start()
    return run(load_config(TINY, overrides))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)  # say where it hangs, and end
    main(Path(sys.argv[1]), Path(sys.argv[2]))
