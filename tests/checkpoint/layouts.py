# SPDX-License-Identifier: Apache-2.0
"""The zoo on every layout, to be saved half-way on one and to go on on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flora_dist import Flora, checkpoint
from flora_dist.checkpoint.contents import gather, others_of
from tests.battery import wrapped, zoo
from tests.battery.oracle import SAMPLES, STEPS, Case
from tests.battery.wrapped import Layout, optimizer_of, weights_of
from tests.conftest import launched_pool_of, pool_of

HALF = 5
"""Steps before the save: inside a window of three."""
Weights = dict[str, Tensor]


@dataclass(kw_only=True)
class Trained:
    """A model in training on one rank."""

    model: nn.Module
    optimizer: Flora
    share: Callable[[Tensor], Tensor]
    """This rank's part of a batch."""
    weights: Callable[[], Weights]
    engine: Any = None

    def run(self, steps: range) -> None:
        for step in steps:
            tokens = self.share(zoo.batch(step, SAMPLES))
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


def hold(layout: Layout, case: Case, model: zoo.Zoo) -> Trained:
    """On one of torch's layouts."""
    held = layout.wrap(model)
    return Trained(
        model=held,
        optimizer=optimizer_of(held, **case.flora),
        share=layout.share,
        weights=lambda: weights_of(held, model),
    )


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
            share=lambda batch: zoo.share(batch, dist.get_rank(), dist.get_world_size()),
            weights=lambda: whole_weights(engine),
            engine=engine,
        )

    return build


_NAMES = (
    *("plain", "ddp x2", "fsdp2 x2", "fsdp2 x3", "fsdp2 x4", "hsdp 2x2", "fsdp2 x tp 2x2"),
    "fsdp1 x2",
)
LAYOUTS: dict[str, tuple[int, Build]] = {
    **{
        name: (wrapped.LAYOUTS[name].ranks, partial(hold, wrapped.LAYOUTS[name])) for name in _NAMES
    },
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
