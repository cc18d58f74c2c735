# SPDX-License-Identifier: Apache-2.0
"""What each process does in the tests of ZeRO-3 that starts from stretches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist.trainer import new_network as trainer_network
from flora_dist.trainer.backend import find_world
from flora_dist.trainer.by_stretches import _put
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.deepspeed_engine import check_engine
from flora_dist.trainer.engine import build_learner
from flora_dist.trainer.model import build_model, read_network
from flora_dist.trainer.new_network import new_network
from flora_dist.trainer.place import Unfit
from tests.trainer.support import TINY


def partitioned(cases: list[list[str]], folder: str) -> list[list[str]]:
    """Names of what differs from the whole network in an engine, case by case."""
    import deepspeed

    found = []
    for overrides in cases:
        config = load_config(TINY, overrides)
        world, network = find_world(config.backend), read_network(Path(folder))
        check_engine(config, world)
        model, parts = new_network(config, network, world, print)
        assert parts is not None
        learner = build_learner(model, config.optimizer, config, world, parts)
        assert not parts
        module = learner.spread.module.module
        assert isinstance(module, nn.Module)
        whole = build_model(config.model, network, seed=config.train.seed)
        wanted = torch.float32 if config.train.precision == "float32" else torch.bfloat16
        gathered: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                gathered[name] = parameter.detach().clone()
        buffers = dict(module.named_buffers())
        assert list(gathered) == [name for name, _ in whole.named_parameters()]
        found.append(
            [
                *(n for n, p in whole.named_parameters() if not gathered[n].equal(p.to(wanted))),
                *(n for n, b in whole.named_buffers() if not b.equal(buffers[n])),
            ]
        )
        learner.spread.close()
    return found


def with_trouble_on_one(overrides: list[str], folder: str) -> tuple[bool, list[str]]:
    """Whether a process has the whole network, and what it says, where process 1 can draw none."""
    config, said = load_config(TINY, overrides), list[str]()
    world, theirs = find_world(config.backend), trainer_network.draw_rows

    def unfit(*args: Any, **options: Any) -> Any:
        if world.process_rank == 1:
            raise Unfit("weight is special")
        return theirs(*args, **options)

    trainer_network.draw_rows = unfit
    try:
        model, parts = new_network(config, read_network(Path(folder)), world, said.append)
    finally:
        trainer_network.draw_rows = theirs
    return parts is None and not any(p.is_meta for p in model.parameters()), said


def put_into_another_partition() -> str:
    """The error where DeepSpeed should pad parameters of 10 elements to more than two halves."""
    padded: Any = SimpleNamespace(ds_tensor=torch.empty(8), ds_numel=10)
    with pytest.raises(RuntimeError) as error:
        _put("layer.weight", padded, torch.ones(5))
    return str(error.value)
