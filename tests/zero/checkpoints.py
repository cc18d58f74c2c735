# SPDX-License-Identifier: Apache-2.0
"""Engines that save, load and go on: bodies of tests, run on each rank."""

from __future__ import annotations

import traceback
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flora_dist.deepspeed as flora_deepspeed
from flora_dist import Flora, checkpoint
from flora_dist.frameworks.deepspeed import checkpoint as deepspeed_checkpoint
from tests.zero import engines, small
from tests.zero.engines import Run
from tests.zero.small import Config, Model, config_of, start, states, train

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 20}}
HALF, END = 4, 8
"""Steps before a checkpoint and at the end; a window is three."""


class Crowded(Model):
    """With a frozen matrix and buffers, one of them small enough to stay whole under ZeRO-3."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(small.WIDTH, small.WIDTH, bias=False).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x_NI: Tensor) -> Tensor:
        self.seen += 0.5
        self.calls += 1
        return super().forward(x_NI + self.frozen(x_NI))


def crowded(seed: int = 0) -> Crowded:
    torch.manual_seed(seed)
    return Crowded()


def contents(flora: Flora) -> dict[str, dict[str, Any]]:
    """All state of this rank, as plain values."""
    return {
        name: {key: v.tolist() if torch.is_tensor(v) else v for key, v in own.items()}
        for name, own in states(flora)
    }


def everything(engine: Any) -> dict[str, Tensor]:
    """Whole weights as the model has them and as masters, and buffers."""
    found = small.weights(engine) | dict(engine.module.named_buffers())
    if engine.optimizer is not flora_deepspeed.attach(engine):
        found |= {f"master of {n}": w for n, w in engines.masters(engine).items()}
    return {name: value.clone() for name, value in found.items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [n for n, value in first.items() if not value.equal(second[n]) and n != "scratch"]


def counters(engine: Any) -> tuple[int, ...]:
    names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    return tuple(getattr(engine, name) for name in names)


def full_config(stage: int, **blocks: Any) -> Config:
    settings = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2, "scheduler": SCHEDULER}
    zero = {"stage": stage, **blocks.pop("zero", {})}
    return config_of(stage, **{**settings, "zero_optimization": zero, **blocks})


def goes_on(stage: int, blocks: Config, folder: str) -> None:
    """Save, load into an engine of other weights, and train both on: every bit must be equal."""
    engines._allow_fp16()
    config = full_config(stage, **blocks)
    engine, flora = start(config, model=crowded())
    train(engine, range(2 * HALF))
    path = flora_deepspeed.save_checkpoint(engine, folder, extra={"seen": HALF})
    saved, before, counted = contents(flora), everything(engine), counters(engine)
    assert saved  # not every step overflowed
    assert path.name == "step-00000004"

    again, loaded = start(config, model=crowded(seed=7))
    found = flora_deepspeed.load_checkpoint(again, folder)
    assert (found.path, found.step, found.extra) == (path, HALF, {"seen": HALF})
    assert differing(before, everything(again)) == []
    assert contents(loaded) == saved
    assert counters(again) == counted
    train(engine, range(2 * HALF, 2 * END))
    train(again, range(2 * HALF, 2 * END))
    assert contents(loaded) == contents(flora)
    assert differing(everything(engine), everything(again)) == []
    assert counters(again) == counters(engine)
    assert again.optimizer.param_groups[0]["lr"] == engine.optimizer.param_groups[0]["lr"]
    scales = [deepspeed_checkpoint._facts_of(each).loss_scale for each in (engine, again)]
    assert scales[0] == scales[1], scales
    assert (scales[0] is not None) == ("fp16" in blocks)
    assert scales[0] is None or scales[0]["cur_scale"] != 2.0**10, scales
    for each in (engine, again):
        each.destroy()


def goes_wrong(stage: int, blocks: Config, folder: str, leaving_out: str) -> str:
    """What ``goes_on`` says, on each rank alike, if a step of the load is left out.

    Said, not raised: ranks that raise are thrown away, and others cost 10 s and more.
    """
    with patch.object(deepspeed_checkpoint, leaving_out, lambda *_: None):
        try:
            goes_on(stage, blocks, folder)
        except AssertionError:
            return traceback.format_exc()
    return ""


# ---- from one layout to another; the same batches whatever the number of ranks


def trained(run: Run, folder: str, steps: range, save: bool) -> dict[str, Tensor]:
    """Load what is in the folder, if anything; train; save; whole masters, on every rank."""
    engine, _ = engines.start(run)
    if steps.start:
        flora_deepspeed.load_checkpoint(engine, folder)
        assert engine.global_steps == steps.start
    for step in steps:
        engines.take_step(engine, step)
    if save:
        flora_deepspeed.save_checkpoint(engine, folder)
    found = engines.whole_weights(engine) if run.dtype == "fp32" else engines.masters(engine)
    engine.destroy()
    return found


# ---- what is refused


def between_micro_batches(stage: int, folder: str) -> None:
    engine, _ = start(config_of(stage, gradient_accumulation_steps=3))
    train(engine, range(4))
    for call in (flora_deepspeed.save_checkpoint, flora_deepspeed.load_checkpoint):
        with pytest.raises(ValueError, match="micro_steps is 4, its gradient_acc"):
            call(engine, folder)
    train(engine, range(4, 6))
    flora_deepspeed.save_checkpoint(engine, folder)
    engine.set_gradient_accumulation_boundary(is_boundary=False)
    with pytest.raises(ValueError, match="between steps"):
        flora_deepspeed.save_checkpoint(engine, folder)


def refusals(folder: str) -> None:
    engine, flora = start(config_of(2, scheduler=SCHEDULER))
    train(engine, range(2))
    with pytest.raises(ValueError, match="leave the name 'deepspeed'"):
        flora_deepspeed.save_checkpoint(engine, folder, extra={"deepspeed": 1})
    flora_deepspeed.save_checkpoint(engine, folder)
    before = everything(engine), contents(flora), counters(engine)

    other, _ = start(config_of(2, scheduler=SCHEDULER))
    other.lr_scheduler.state_dict = lambda: {"another": 1}
    with pytest.raises(ValueError, match="the scheduler must be the one that was saved"):
        flora_deepspeed.load_checkpoint(other, folder)
    params = {**small.PARAMS, "seed": 1}
    seeded, _ = start(config_of(2, optimizer={"type": "Flora", "params": params}))
    with pytest.raises(ValueError, match="must have the optimizer's seed"):
        flora_deepspeed.load_checkpoint(seeded, folder)
    assert counters(seeded)[0] == 0

    train(engine, range(2, 3))
    engine.lr_scheduler.state_dict = lambda: {"function": print}
    with pytest.raises(ValueError, match=r"the state of WarmupLR.function is builtins"):
        flora_deepspeed.save_checkpoint(engine, folder)
    del engine.lr_scheduler.state_dict
    flora_deepspeed.load_checkpoint(engine, folder)  # the first is still whole
    now = everything(engine), contents(flora), counters(engine)
    assert differing(before[0], now[0]) == []
    assert before[1:] == now[1:]


def other_optimizer(folder: str) -> None:
    import deepspeed

    config = config_of(1, optimizer={"type": "Adam", "params": {"torch_adam": True}})
    engine, *_ = deepspeed.initialize(model=small.build(), config=config)
    for call in (flora_deepspeed.save_checkpoint, flora_deepspeed.load_checkpoint):
        with pytest.raises(TypeError, match="whose optimizer is Flora"):
            call(engine, folder)


def no_scheduler_saved(folder: str) -> None:
    """A checkpoint of a plain model has none; the engine's counters follow from the steps."""
    model = small.build()
    flora = Flora(model.named_parameters(), **small.PARAMS)
    checkpoint.save(folder, model, flora, step=5, extra={"a": [1]})
    engine, _ = start(config_of(2, scheduler=SCHEDULER))
    with pytest.warns(UserWarning, match="the checkpoint has none"):
        loaded = flora_deepspeed.load_checkpoint(engine, folder)
    assert loaded.extra == {"a": [1]}
    assert counters(engine) == (5, 5 * small.SAMPLES * dist.get_world_size(), 5, 0)
