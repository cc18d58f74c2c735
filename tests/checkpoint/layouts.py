# SPDX-License-Identifier: Apache-2.0
"""The zoo on every layout, to be saved half-way on one and to go on on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flora_dist import Flora, checkpoint, fsdp1
from flora_dist.checkpoint.contents import gather, others_of
from tests.battery import zoo
from tests.battery.layouts import (
    _parallelize,
    fsdp1_weights,
    full_weights,
    wrap_in_fsdp1,
)
from tests.battery.oracle import SAMPLES, STEPS, Case
from tests.conftest import launched_pool_of, pool_of

HALF = 5
"""Steps before the save: inside a window of three."""
Weights = dict[str, Tensor]


@dataclass(kw_only=True)
class Trained:
    """A model in training on one rank."""

    model: nn.Module
    optimizer: Flora
    share: int
    shares: int
    weights: Callable[[], Weights]
    engine: Any = None

    def run(self, steps: range) -> None:
        for step in steps:
            tokens = zoo.share(zoo.batch(step, SAMPLES), self.share, self.shares)
            if self.engine is not None:
                self.engine.backward(self.engine(tokens))
                self.engine.step()
                continue
            self.model(tokens).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        if self.engine is not None:
            import flora_dist.deepspeed

            flora_dist.deepspeed.save_checkpoint(self.engine, folder)
        else:
            checkpoint.save(folder, self.model, self.optimizer, step=HALF, extra={"who": "zoo"})

    def load(self, folder: Path) -> None:
        if self.engine is not None:
            import flora_dist.deepspeed

            loaded = flora_dist.deepspeed.load_checkpoint(self.engine, folder)
        else:
            loaded = checkpoint.load(folder, self.model, self.optimizer)
        assert loaded.step == HALF, loaded

    def everything(self) -> dict[str, Tensor]:
        """Whole weights, and this rank's boxes of weights and states."""
        contents = gather(self.optimizer, others_of(self.model, self.optimizer))
        boxes = {
            f"{key} at {box.offsets}": box.values.detach().clone()
            for key, held in contents.tensors.items()
            for box in held.boxes
        }
        counters = torch.tensor([c.get("step", -1) for c in contents.parameters.values()])
        return {**self.weights(), **boxes, "counters": counters}


Build = Callable[[Case, zoo.Zoo], Trained]


def _trained(
    wrapped: nn.Module, model: nn.Module, case: Case, shares: int | None = None
) -> Trained:
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_initialized() else 1
    shares = size if shares is None else shares
    return Trained(
        model=wrapped,
        optimizer=Flora(wrapped.named_parameters(), **case.flora),
        share=rank // (size // shares),
        shares=shares,
        weights=lambda: full_weights(model),
    )


def on_plain(case: Case, model: zoo.Zoo) -> Trained:
    return _trained(model, model, case)


def on_ddp(case: Case, model: zoo.Zoo) -> Trained:
    return _trained(DistributedDataParallel(model), model, case)


def on_fsdp2(case: Case, model: zoo.Zoo) -> Trained:
    return _sharded(case, model, init_device_mesh("cpu", (dist.get_world_size(),)))


def on_hsdp(case: Case, model: zoo.Zoo) -> Trained:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return _sharded(case, model, mesh)


def _sharded(case: Case, model: zoo.Zoo, mesh: Any) -> Trained:
    for layer in (model.up, model.down, model.conv, model.single):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _trained(model, model, case)


def on_fsdp2_and_tensor_parallel(case: Case, model: zoo.Zoo) -> Trained:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    _parallelize(model, mesh["tensor"])
    for layer in (model.up, model.down, model.conv, model.single):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return _trained(model, model, case, shares=2)


def on_fsdp1(case: Case, model: zoo.Zoo) -> Trained:
    wrapped = wrap_in_fsdp1(model)
    trained = _trained(wrapped, wrapped, case)
    fsdp1.attach(wrapped, trained.optimizer)
    trained.weights = lambda: fsdp1_weights(wrapped)
    return trained


def _on_zero(stage: int) -> Build:
    def build(case: Case, model: zoo.Zoo) -> Trained:
        import flora_dist.deepspeed
        from tests.zero.engines import whole_weights

        config = {
            "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size(),
            "optimizer": {"type": "Flora", "params": case.flora},
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
        }
        engine, *_ = flora_dist.deepspeed.initialize(model=model, config=config)
        return Trained(
            model=engine.module,
            optimizer=flora_dist.deepspeed.attach(engine),
            share=dist.get_rank(),
            shares=dist.get_world_size(),
            weights=lambda: whole_weights(engine),
            engine=engine,
        )

    return build


LAYOUTS: dict[str, tuple[int, Build]] = {
    "plain": (1, on_plain),
    "ddp x2": (2, on_ddp),
    "fsdp2 x2": (2, on_fsdp2),
    "fsdp2 x3": (3, on_fsdp2),
    "fsdp2 x4": (4, on_fsdp2),
    "hsdp 2x2": (4, on_hsdp),
    "fsdp2 x tp 2x2": (4, on_fsdp2_and_tensor_parallel),
    "fsdp1 x2": (2, on_fsdp1),
    "zero-1 x2": (2, _on_zero(1)),
    "zero-2 x3": (3, _on_zero(2)),
    "zero-3 x2": (2, _on_zero(3)),
}
"""Name -> (ranks, how to build the zoo there)."""


def save_half_way(layout: str, case: Case, folder: Path) -> dict[str, Tensor]:
    """Train, save half-way, go on; everything at the end."""
    trained = LAYOUTS[layout][1](case, zoo.build(case.dtype))
    trained.run(range(HALF))
    trained.save(folder)
    trained.run(range(HALF, STEPS))
    return _finish(trained)


def resume(layout: str, case: Case, folder: Path) -> dict[str, Tensor]:
    """Go on from a checkpoint with a model of other weights and another lr."""
    model = zoo.build(case.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    other = Case(dtype=case.dtype, settings={**case.settings, "lr": 0.7})
    trained = LAYOUTS[layout][1](other, model)
    trained.load(folder)
    trained.run(range(HALF, STEPS))
    return _finish(trained)


def _finish(trained: Trained) -> dict[str, Tensor]:
    found = {k: v.detach().clone() for k, v in trained.everything().items()}
    if trained.engine is not None:
        trained.engine.destroy()
    return found


def on_ranks(layout: str, body: Callable[..., Any], case: Case, folder: Path) -> list[Any]:
    """What each rank of a layout returns: ``body`` is one of the two above."""
    size = LAYOUTS[layout][0]
    if size == 1:
        return [body(layout, case, folder)]
    # ZeRO's engines are started as users start them.
    pool = launched_pool_of(size) if "zero" in layout else pool_of(size)
    return pool(body, layout, case, folder)
