# SPDX-License-Identifier: Apache-2.0
"""A model of a few matrices and an engine around it, for tests of features rather than numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import flora_dist.deepspeed
from flora_dist import Flora

Config = dict[str, Any]

WIDTH, OUTPUTS, SAMPLES = 24, 10, 4
PARAMS: dict[str, Any] = {"lr": 1e-2, "rank": 2, "block": 8, "kappa": 3, "state_dtype": "float32"}
STAGES = (0, 1, 2, 3)


class Model(nn.Module):
    """Odd shapes, so that partitions cut rows; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 37)
        self.down = nn.Linear(37, OUTPUTS)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.down(self.up(x_NI).tanh()).square().mean()


def build(seed: int = 0) -> Model:
    """The model, with weights that hang on the seed alone."""
    torch.manual_seed(seed)
    return Model()


def config_of(stage: int, **blocks: Any) -> Config:
    """A config with Flora; ``blocks`` replace or add to its own."""
    return {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "optimizer": {"type": "Flora", "params": PARAMS},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **blocks,
    }


def start(config: Config, **arguments: Any) -> tuple[Any, Flora]:
    """An engine and its Flora."""
    model = arguments.pop("model", None) or build()
    engine, *_ = flora_dist.deepspeed.initialize(model=model, config=config, **arguments)
    return engine, flora_dist.deepspeed.attach(engine)


def by_host(**arguments: Any) -> Any:
    """An engine of DeepSpeed's own, which nobody has attached, whatever has been imported."""
    engine, *_ = inspect.unwrap(deepspeed.initialize)(**arguments)
    return engine


def batch(step: int) -> Tensor:
    """This rank's samples of a micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(SAMPLES, WIDTH, generator=generator)


def train(engine: Any, steps: range) -> None:
    """Each micro-batch of ``steps``; the engine steps when it has enough of them."""
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        engine.backward(engine(batch(step).to(dtype)))
        engine.step()


def weights(engine: Any) -> dict[str, Tensor]:
    """Whole weights as the model has them."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def states(flora: Flora) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each parameter's state on this rank; those of partitions by name, others by place."""
    for index, state in enumerate(flora.state.values()):
        nested = {name: own for name, own in state.items() if isinstance(own, dict)}
        yield from nested.items() if nested else [(f"#{index}", state)]


def counts(flora: Flora) -> set[int]:
    """The steps that the states of this rank have counted."""
    return {own["step"] for _, own in states(flora)}
