# SPDX-License-Identifier: Apache-2.0
"""Flora on two workers of Ray Train, on FSDP2 and under DeepSpeed; the losses go to a file.

python -m tests.hosts.ray_runs losses.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import flora_dist.deepspeed
from flora_dist import Flora
from tests.hosts.small import DECAY, LR, MAX_NORM, SAMPLES, SETTINGS, STEPS, Samples, build

ARGUMENTS: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, **SETTINGS}


def own_samples() -> Any:
    size = SAMPLES // dist.get_world_size()
    return Samples().tokens[dist.get_rank() * size :][:size]


def on_fsdp2() -> Iterator[Tensor]:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = build()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Flora(model.named_parameters(), **ARGUMENTS)
    tokens = own_samples()
    while True:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def under_deepspeed() -> Iterator[Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size(),
        "optimizer": {"type": "Flora", "params": ARGUMENTS},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
        "gradient_clipping": MAX_NORM,
    }
    engine, *_ = flora_dist.deepspeed.initialize(model=build(), config=config)
    tokens = own_samples()
    while True:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        yield loss


def loop(config: dict[str, Any]) -> list[float]:
    ways = {"fsdp2": on_fsdp2, "deepspeed": under_deepspeed}
    losses = []
    for _, loss in zip(range(STEPS), ways[config["way"]](), strict=False):
        dist.all_reduce(mean := loss.detach().clone())
        losses.append(float(mean) / dist.get_world_size())
    return losses


def main(target: Path) -> None:
    """Train in both ways, one after the other."""
    found = {}
    for way in ("fsdp2", "deepspeed"):
        trainer = TorchTrainer(
            loop,
            train_loop_config={"way": way},
            scaling_config=ScalingConfig(num_workers=2),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(name=way, storage_path=str(target.parent / "ray")),
        )
        # What rank 0's loop returned: Ray keeps metrics beside a checkpoint alone.
        found[way] = trainer.fit().return_value
    target.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
