# SPDX-License-Identifier: Apache-2.0
"""Shards that rest in the CPU's memory: asked of every unit, and filled there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from flora_dist.trainer import sharded
from flora_dist.trainer.by_rows import fill_
from flora_dist.trainer.config import Config
from flora_dist.trainer.replicated import World
from tests.trainer.ragged import tiny_model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_unit_is_offloaded_and_only_an_accelerators_memory_is_pinned(
    device: str, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def shard(module: nn.Module, *, offload_policy: Any, **_: Any) -> nn.Module:
        asked.append(offload_policy)
        return module

    monkeypatch.setattr(sharded, "fully_shard", shard)
    monkeypatch.setattr(
        sharded, "init_device_mesh", lambda kind, *_, **__: SimpleNamespace(device_type=kind)
    )
    world = World(process_rank=0, size=1, device=torch.device(device))
    config = tiny("backend={name: fsdp2, cpu_offload: true}")
    model = tiny_model(config)
    sharded.fsdp2(model, config, world)
    units = 1 + config_layers(model)
    assert asked == [CPUOffloadPolicy(pin_memory=device == "cuda")] * units
    asked.clear()
    sharded.fsdp2(model, tiny("backend.name=fsdp2"), world)
    assert len(asked) == units
    assert not any(isinstance(policy, CPUOffloadPolicy) for policy in asked)


def config_layers(model: nn.Module) -> int:
    return int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]


def test_shards_that_rest_elsewhere_are_filled_there_and_buffers_on_the_device() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    module = nn.Sequential(Holder(), Holder())
    # The meta device stands for an accelerator.
    fill_(module, {}, resting=torch.device("cpu"), device=torch.device("meta"))
    assert [buffer.device.type for buffer in module.buffers()] == ["meta", "meta"]
    fill_(module := Holder(), {}, resting=torch.device("meta"), device=torch.device("cpu"))
    assert torch.equal(module.table, torch.arange(3.0))  # type: ignore[arg-type]
    assert not module.state_dict()
