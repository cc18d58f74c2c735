# SPDX-License-Identifier: Apache-2.0
"""Flora on workers of Ray Train: plain, DDP, FSDP2 and DeepSpeed, and a run that Ray retries.

python -m tests.hosts.ray_runs WORKERS FILE    losses of every way that many workers have
python -m tests.hosts.ray_runs retried FILE    whether a loop that failed half way has the same bits
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import flora_dist.deepspeed
from flora_dist import Flora
from tests.hosts.small import (
    DECAY,
    LR,
    MAX_NORM,
    SAMPLES,
    SETTINGS,
    STEPS,
    Samples,
    blank,
    build,
    whole_weights,
)
from tests.hosts.trainer_runs import SKETCHES

ARGUMENTS: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, **SETTINGS}


def own_samples() -> Any:
    size = SAMPLES // dist.get_world_size()
    return Samples().tokens[dist.get_rank() * size :][:size]


def stepped(model: Any, optimizer: Flora) -> Iterator[Tensor]:
    """The loss of each step of a plain loop."""
    tokens = own_samples()
    while True:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def prepared(inner: Any, **sketches: Any) -> tuple[Any, Flora]:
    """As docs/hosts/ray.md has it: plain on one worker, DDP on more."""
    model = prepare_model(inner)
    optimizer = Flora(inner.named_parameters(), **ARGUMENTS)
    if sketches:
        flora_dist.attach(model, optimizer, **sketches)
    return model, optimizer


def on_fsdp2() -> Iterator[Tensor]:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = build()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return stepped(model, Flora(model.named_parameters(), **ARGUMENTS))


def under_deepspeed(**zero: Any) -> Iterator[Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size(),
        "optimizer": {"type": "Flora", "params": ARGUMENTS},
        "zero_optimization": zero,
        "gradient_clipping": MAX_NORM,
    }
    engine, *_ = flora_dist.deepspeed.initialize(model=build(), config=config)
    tokens = own_samples()
    while True:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        yield loss


ON_ONE: dict[str, Any] = {
    "prepared": lambda: stepped(*prepared(build())),
    "prepared, sketched": lambda: stepped(*prepared(build(), **SKETCHES)),
}
ON_MORE: dict[str, Any] = {
    **ON_ONE,
    "fsdp2": on_fsdp2,
    "zero2": partial(under_deepspeed, stage=2),
    "zero3": partial(under_deepspeed, stage=3),
    "offload": partial(under_deepspeed, stage=2, offload_optimizer={"device": "cpu"}),
}


def loop() -> dict[str, list[float]]:
    """All ways, one after the other: a start of workers costs more than their trainings."""
    ways = ON_ONE if dist.get_world_size() == 1 else ON_MORE
    found: dict[str, list[float]] = {way: [] for way in ways}
    for way, start in ways.items():
        for _, loss in zip(range(STEPS), start(), strict=False):
            dist.all_reduce(mean := loss.detach().clone())
            found[way].append(float(mean) / dist.get_world_size())
    return found


def retried_loop() -> bool:
    """Fails half way; whether the loop that Ray starts again ends as one that did not fail."""
    checkpoint = ray.train.get_checkpoint()
    inner = blank() if checkpoint else build()
    model, optimizer = prepared(inner)
    if checkpoint is None:
        for _ in zip(range(STEPS // 2), stepped(model, optimizer), strict=False):
            pass
        with tempfile.TemporaryDirectory() as folder:
            states = {"model": inner.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(states, Path(folder) / "states.pt")
            ours = Checkpoint.from_directory(folder) if dist.get_rank() == 0 else None
            ray.train.report({}, checkpoint=ours)
        raise RuntimeError("this worker fails once, as planned")
    with checkpoint.as_directory() as folder:
        states = torch.load(Path(folder) / "states.pt", weights_only=True)
    inner.load_state_dict(states["model"])
    optimizer.load_state_dict(states["optimizer"])
    for _ in zip(range(STEPS - STEPS // 2), stepped(model, optimizer), strict=False):
        pass
    unstopped, other = prepared(build())
    for _ in zip(range(STEPS), stepped(unstopped, other), strict=False):
        pass
    expected = whole_weights(unstopped)
    return all(torch.equal(value, expected[n]) for n, value in whole_weights(model).items())


def main(what: str, target: Path) -> None:
    is_retried = what == "retried"
    trainer = TorchTrainer(
        retried_loop if is_retried else loop,
        scaling_config=ScalingConfig(num_workers=2 if is_retried else int(what)),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            storage_path=str(target.parent / "ray"),
            failure_config=FailureConfig(max_failures=int(is_retried)),
        ),
    )
    # What rank 0's loop returned: Ray keeps metrics beside a checkpoint alone.
    target.write_text(json.dumps(trainer.fit().return_value), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
