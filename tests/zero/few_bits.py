# SPDX-License-Identifier: Apache-2.0
"""An engine's mean sketches in few bits beside those of DDP, which has the same batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import flora_dist
import flora_dist.deepspeed
from flora_dist import Flora
from flora_dist.core.sketch.keys import canonical_name
from flora_dist.core.step.gradient import Records
from flora_dist.core.tiles import Tile
from flora_dist.frameworks.deepspeed import gradients as of_engines
from flora_dist.gradients.cycle import Gradients
from tests.battery import zoo
from tests.battery.oracle import Case
from tests.gradients.faults import broken
from tests.zero.engines import whole_weights

SAMPLES, ACCUMULATION = 24, 2
SETTINGS = Case(dtype=torch.float32, settings={"momentum": "blend", "state_bits": 4}).flora
Found = dict[str, list[tuple[Tile, tuple[int, int], Tensor]]]
"""Tile, its blocks and their records."""


def compared(
    stage: int, bits: int, wire_bits: int, cap: float | None = None, fault: str = ""
) -> tuple[int, int, float]:
    """One step: blocks kept here, blocks whose records differ, and the farthest weight's distance.

    The engine's records are sent during backward where there is a ``cap``, DDP's never. The first
    gradients of two layouts are the same numbers, so that records are the same bytes.
    """
    words = {"gradient_bits": bits, "wire_bits": wire_bits}
    wanted, expected = _by_ddp(words)
    with broken(fault) if fault else nullcontext():
        found, weights = _by_engine(stage, words, cap)
    kept = differing = 0
    for name, pieces in found.items():
        ((_, _, everything),) = wanted[name]
        for tile, blocks, octets in pieces:
            there = everything[slice(*tile.matrices), slice(*tile.rows), slice(*blocks)]
            kept += octets[..., 0].numel()
            differing += int((there != octets).any(-1).sum())
    farthest = max(float((weights[n] - w).abs().max()) for n, w in expected.items())
    return kept, differing, farthest


def _by_ddp(words: dict[str, int]) -> tuple[Found, dict[str, Tensor]]:
    model = zoo.build(torch.float32)
    ddp = DistributedDataParallel(model)
    flora = Flora(model.named_parameters(), **SETTINGS)
    handle = flora_dist.attach(ddp, flora, "compressed", **words)
    for share in _shares():
        (ddp(share) / ACCUMULATION).backward()
    handle.gradients.reduce()
    found = _records(handle.gradients)
    flora.step()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return found, {canonical_name(name): weight for name, weight in trained.items()}


def _by_engine(
    stage: int, words: dict[str, int], cap: float | None
) -> tuple[Found, dict[str, Tensor]]:
    config = _config(stage, words)
    if cap is not None:
        config["flora"]["bucket_cap_mb"] = cap
    engine, *_ = flora_dist.deepspeed.initialize(model=zoo.build(torch.float32), config=config)
    flora = flora_dist.deepspeed.attach(engine)
    gradients = of_engines._handles[flora].gradients
    found: Found = {}
    flora.register_step_pre_hook(lambda *_: found.update(_records(gradients)))
    for share in _shares():
        engine.backward(engine(share))
        is_last = engine.is_gradient_accumulation_boundary()
        assert gradients._is_under_way == (is_last and cap is not None)
        engine.step()
    weights = whole_weights(engine)
    engine.destroy()
    return found, weights


def _records(gradients: Gradients) -> Found:
    """Of every tile that this rank keeps; those of stage 0 are averaged in the step itself."""
    gradients.reduce()
    found: Found = {}
    for name, flow in gradients.flows.items():
        mean = gradients.mean_of(name)
        assert mean is not None, name
        route = flow.source.route
        pieces = []
        for tile, records in zip(route.kept[route.rank], mean.tiles, strict=True):
            assert isinstance(records, Records)
            pieces.append((tile, tile.blocks(flow.geometry.block), records.octets.clone()))
        found[name] = pieces
    return found


def _shares() -> list[Tensor]:
    """This rank's micro-batches."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return list(zoo.batch(0, SAMPLES).chunk(ACCUMULATION * ranks))[rank::ranks]


def _config(stage: int, words: dict[str, int]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SAMPLES // (ACCUMULATION * dist.get_world_size()),
        "gradient_accumulation_steps": ACCUMULATION,
        "steps_per_print": 10**9,
        "optimizer": {"type": "Flora", "params": SETTINGS},
        "zero_optimization": {"stage": stage},
        "flora": {"gradients": "compressed", **words},
    }
