# SPDX-License-Identifier: Apache-2.0
"""A run's network before its first step, in no more of each process's memory than it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_dist.trainer.backend import sum_over_processes
from flora_dist.trainer.by_rows import draw_rows
from flora_dist.trainer.by_stretches import check_partitions
from flora_dist.trainer.config import PURE, Config
from flora_dist.trainer.deepspeed_json import engine_settings
from flora_dist.trainer.model import build_model, weight_dtype
from flora_dist.trainer.place import WHOLE, Drawn, Place, Rows, Shard, Stretch
from flora_dist.trainer.pretrained_rows import read_rows
from flora_dist.trainer.replicated import World
from flora_dist.trainer.trained import is_run


def new_network(
    config: Config, network: Any, world: World, say: Callable[[str], object]
) -> tuple[nn.Module, Rows | None]:
    """The network: whole, or without memory and this process's part where that is all it needs.

    ``say`` is told in a line where a network cannot come to be parameter after parameter.

    Raises:
        ValueError: weights that are to be loaded are missing, damaged or another model's.
    """
    seed, dtype = config.train.seed, weight_dtype(config.train)
    place = place_in(config, world)
    if place is not None:
        drawn, cause = _tried(config, network, place, world)
        # Of another process's trouble nobody else would hear: only one prints.
        failed = torch.tensor([int(drawn is None)], device=world.device)
        if count := int(sum_over_processes(failed)):
            does = "draw" if config.model.pretrained is None else "load"
            why = cause or "process 0 had no trouble and knows no cause"
            if isinstance(place, Stretch):  # processes partition a network together
                drawn, count = None, world.size
            say(f"{count} of {world.size} processes {does} the whole network: {why}")
        if drawn is not None:
            return drawn.model, drawn.rows
    elif dtype != torch.float32 and not _is_of_a_run(config):
        try:
            return settled(_in_place(config, network, WHOLE)), None
        except RuntimeError as error:
            say(f"every process builds the network in float32 first: {error}")
    return build_model(config.model, network, seed=seed, dtype=dtype), None


def place_in(config: Config, world: World) -> Place | None:
    """What a process keeps where that is all it needs; None: it needs the whole network."""
    backend = config.backend
    if config.model.lora is not None or _is_of_a_run(config):
        return None
    if backend.name == "fsdp2":
        return Shard(number=world.process_rank, count=world.size)
    if backend.name == "hsdp":
        count = backend.shard or 1
        return Shard(number=world.process_rank % count, count=count)
    if backend.name == "deepspeed":
        zero = engine_settings(config, world.size).get("zero_optimization", {})
        if zero.get("stage") == 3:
            return Stretch(number=world.process_rank, count=world.size)
    return None


def settled(drawn: Drawn) -> nn.Module:
    """The network with memory, where all of it was kept."""
    for name, parameter in drawn.model.named_parameters():
        own = nn.Parameter(drawn.rows.pop(name), parameter.requires_grad)
        torch.utils.swap_tensors(parameter, own)  # type: ignore[no-untyped-call]
    return drawn.model


def _tried(config: Config, network: Any, place: Place, world: World) -> tuple[Drawn | None, str]:
    """What `_in_place` gives, or why it gives nothing."""
    try:
        if isinstance(place, Stretch):
            check_partitions(engine_settings(config, world.size))
        return _in_place(config, network, place), ""
    except RuntimeError as error:
        return None, str(error)


def _in_place(config: Config, network: Any, place: Place) -> Drawn:
    seed, dtype = config.train.seed, weight_dtype(config.train)
    if isinstance(place, Stretch) and config.train.precision in {"bfloat16", PURE}:
        dtype = torch.bfloat16  # what an engine makes of weights before it takes masters of them
    if config.model.pretrained is None:
        return draw_rows(network, place, seed=seed, dtype=dtype)
    return read_rows(Path(config.model.pretrained), network, place, seed=seed, dtype=dtype)


def _is_of_a_run(config: Config) -> bool:
    """Whether weights come from another run's checkpoint, which is read whole."""
    return config.model.pretrained is not None and is_run(Path(config.model.pretrained))
