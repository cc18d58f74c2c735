# SPDX-License-Identifier: Apache-2.0
"""Eleven architectures of transformers on one process, FSDP2 and ZeRO-2: the same losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import flora_dist.deepspeed
from flora_dist import Flora
from tests.conftest import launched_pool_of
from tests.hosts.architectures import ARCHITECTURES, SAMPLES

pytestmark = pytest.mark.deepspeed
STEPS = 4
SETTINGS: dict[str, Any] = {
    "lr": 3e-3,
    "rank": 4,
    "block": 16,
    "kappa": 3,
    "state_dtype": "float32",
}
BY_DEFAULT = ("Llama, tied", "GPT-2", "Qwen3-MoE")


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(5)
    return ARCHITECTURES[name]()


def on_one_process(name: str) -> list[float]:
    model, batch = built(name)
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def mine(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return {name: value.chunk(ranks)[rank] for name, value in batch.items()}


def mean(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def on_fsdp2(name: str) -> list[float]:
    model, batch = built(name)
    wrapped: Any = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Flora(wrapped.named_parameters(), **SETTINGS)
    losses = []
    for _ in range(STEPS):
        loss = wrapped(**mine(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    return losses


def on_zero_2(name: str) -> list[float]:
    model, batch = built(name)
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size(),
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1
        "steps_per_print": 10**9,
    }
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    engine, *_ = flora_dist.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for _ in range(STEPS):
        loss = engine(**mine(batch)).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    engine.destroy()
    return losses


def on_both(names: list[str]) -> dict[str, tuple[list[float], list[float]]]:
    return {name: (on_fsdp2(name), on_zero_2(name)) for name in names}


def assert_equal_losses(names: list[str]) -> None:
    sharded = launched_pool_of(2)(on_both, names)[0]
    for name in names:
        expected = on_one_process(name)
        assert expected[-1] < expected[0], name
        for found in sharded[name]:
            # fp32, and key biases whose true gradient is zero turn rounding into steps
            assert found == pytest.approx(expected, rel=1e-4), name


def test_three_architectures_train_alike_on_every_layout() -> None:
    assert_equal_losses(list(BY_DEFAULT))


@pytest.mark.slow
def test_the_other_architectures_train_alike_on_every_layout() -> None:
    assert_equal_losses([name for name in ARCHITECTURES if name not in BY_DEFAULT])
