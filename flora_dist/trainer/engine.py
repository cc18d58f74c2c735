# SPDX-License-Identifier: Apache-2.0
"""Model, optimizer and schedule put together as the backend needs it, after its own checks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from flora_dist.trainer.backend import bound_waits, spread
from flora_dist.trainer.by_rows import fill_
from flora_dist.trainer.config import Config, OptimizerConfig
from flora_dist.trainer.gradients import check_level, keep_sketched
from flora_dist.trainer.in_backward import check_in_backward, in_backward
from flora_dist.trainer.optimizers import build_optimizer, schedule_factor
from flora_dist.trainer.place import Rows
from flora_dist.trainer.replicated import Learner, Spread, World
from flora_dist.trainer.storage import TorchStorage, TorchStorageBehind

_DTENSORS = ("fsdp2", "hsdp")
_FLAT = ("fsdp1", "deepspeed")


def check_learner(config: Config, world: World) -> None:
    """Refuse what the backend cannot do.

    Raises:
        ValueError: Adafactor, checkpoints, sketched gradients or steps in backward where they do
            not work, or a DeepSpeed config that contradicts the run's.
    """
    check_level(config)
    check_in_backward(config, world)
    name = config.backend.name
    if config.optimizer.name == "adafactor" and name in _DTENSORS:
        raise ValueError(
            "torch.optim.Adafactor cannot step DTensors (torch 2.13: its in-place squares need a "
            f"placement change); backend.name={name!r}. Use none or ddp."
        )
    if config.optimizer.name == "adafactor" and name in _FLAT:
        raise ValueError(
            "torch.optim.Adafactor needs whole matrices: in flat parts it keeps second moments "
            f"element by element; backend.name={name!r}. Use none or ddp."
        )
    _check_storage(config)
    if name == "deepspeed":
        from flora_dist.trainer.deepspeed_engine import check_engine

        check_engine(config, world)


def _check_storage(config: Config) -> None:
    """Refuse checkpoints that the backend could not write.

    Raises:
        ValueError: of another optimizer than Flora in flat parts, or behind DeepSpeed's back.
    """
    checkpoint, backend, optimizer = config.checkpoint, config.backend.name, config.optimizer.name
    if checkpoint.every is None and checkpoint.resume is None:
        return
    if backend in _FLAT and optimizer != "flora":
        raise ValueError(
            f"in flat parts only Flora says which element its state belongs to; backend.name="
            f"{backend!r} and optimizer.name={optimizer!r} have checkpoint.every="
            f"{checkpoint.every!r} and checkpoint.resume={checkpoint.resume!r}. Set both to null, "
            "or use ddp, fsdp2 or hsdp."
        )
    if backend == "deepspeed" and checkpoint.asynchronous:
        raise ValueError(
            "an engine's checkpoint is written before training goes on; backend.name='deepspeed' "
            "has checkpoint.asynchronous=True. Set it to false."
        )


def build_learner(
    model: nn.Module,
    optimizer: OptimizerConfig,
    config: Config,
    world: World,
    rows: Rows | None = None,
) -> Learner:
    """Spread the model and give it the optimizer and the run's schedule.

    ``rows``: what this process keeps of a model that has no memory yet; None: it has its weights.
    """
    if config.backend.name == "deepspeed":
        learner = _deepspeed(model, optimizer, config, world, rows)
    elif rows is not None:
        learner = _filled(model, optimizer, config, world, rows)
    else:
        builder = _fsdp1 if config.backend.name == "fsdp1" else _plain
        learner = builder(model, optimizer, config, world)
    bound_waits(config.backend)
    return learner


def _plain(model: nn.Module, optimizer: OptimizerConfig, config: Config, world: World) -> Learner:
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    return _learner(spread(model, config, world), model, vectors, optimizer, config)


def _filled(
    model: nn.Module, optimizer: OptimizerConfig, config: Config, world: World, rows: Rows
) -> Learner:
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    model_spread = spread(model, config, world)
    resting = torch.device("cpu") if config.backend.cpu_offload else world.device
    fill_(model_spread.module, rows, resting=resting, device=world.device)
    return _learner(model_spread, model, vectors, optimizer, config)


def _learner(
    model_spread: Spread,
    model: nn.Module,
    vectors: set[str],
    optimizer: OptimizerConfig,
    config: Config,
) -> Learner:
    built = build_optimizer(
        optimizer, model.named_parameters(), seed=config.train.seed, vectors=vectors
    )
    handle = keep_sketched(model_spread.module, built, config.gradients)
    if handle is not None:
        # Hooks on tensors outside the model hold it, where no collector sees them.
        model_spread = replace(model_spread, close=handle.remove)
    model_spread = in_backward(model_spread, built, config)
    factor = schedule_factor(config.schedule, config.train.steps)
    storage = TorchStorageBehind if config.checkpoint.asynchronous else TorchStorage
    return Learner(
        spread=model_spread,
        optimizer=built,
        scheduler=LambdaLR(built, factor),
        gradients=handle.report() if handle is not None else None,
        storage=storage(module=model_spread.module, optimizer=built),
    )


def _fsdp1(model: nn.Module, optimizer: OptimizerConfig, config: Config, world: World) -> Learner:
    from flora_dist import Flora, fsdp1

    learner = _plain(model, optimizer, config, world)
    if isinstance(learner.optimizer, Flora):
        fsdp1.attach(learner.spread.module, learner.optimizer)
    return learner


def _deepspeed(
    model: nn.Module,
    optimizer: OptimizerConfig,
    config: Config,
    world: World,
    stretches: Rows | None,
) -> Learner:
    from flora_dist.trainer.deepspeed_engine import build_engine

    return build_engine(model, optimizer, config, world, stretches)
