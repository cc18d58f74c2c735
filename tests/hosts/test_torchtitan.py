# SPDX-License-Identifier: Apache-2.0
"""torchtitan's container with Flora in it, sharded and replicated; its flat state through DCP.

torchtitan's own trainer needs CUDA, so what is built here is what it builds around its model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flora_dist import Flora
from tests.conftest import pool_of
from tests.hosts.small import LR, SAMPLES, SETTINGS, STEPS, Samples, build, whole_weights

NORMS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def container(model: Any, implementation: str) -> Any:
    """AdamW for norms and Flora for the rest, as a config of torchtitan's says it."""
    from torchtitan.components.optimizer import ParamGroupConfig

    from flora_dist.torchtitan import FloraContainer

    flora = {"lr": LR, "weight_decay": 0.1, **SETTINGS}
    config = FloraContainer.Config(
        implementation=implementation,
        param_groups=[
            ParamGroupConfig(pattern=r"norm", optimizer_name="AdamW", optimizer_kwargs=NORMS),
            ParamGroupConfig(pattern=r".*", optimizer_name="Flora", optimizer_kwargs=flora),
        ],
    )
    return config.build(model_parts=[model])


LAYOUTS = {"fsdp": 1, "ddp": 2}
"""Replicas of the weights on two ranks; torchtitan 0.3 makes its DDP by fully_shard too."""


def sharded(replicas: int) -> Any:
    shape = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    if replicas == 1:
        mesh = mesh["shard"]
    model = build()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: Any, optimizers: Any, *, rank: int, ranks: int) -> None:
    tokens = Samples().tokens[rank * SAMPLES // ranks : (rank + 1) * SAMPLES // ranks]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizers.step()
    optimizers.zero_grad()


Case = tuple[str, str]
"""A layout, and the implementation that a config names."""
CASES: list[Case] = [("fsdp", "for-loop"), ("fsdp", "foreach"), ("ddp", "foreach")]


def all_trained_and_resumed(folder: str) -> dict[Case, tuple[dict[str, Tensor], bool]]:
    return {case: trained_and_resumed(f"{folder}/{'-'.join(case)}", *case) for case in CASES}


def trained_and_resumed(
    folder: str, layout: str, implementation: str
) -> tuple[dict[str, Tensor], bool]:
    place = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}
    model = sharded(LAYOUTS[layout])
    optimizers = container(model, implementation)
    assert sorted(type(each).__name__ for each in optimizers) == ["AdamW", "Flora"]
    for _ in range(STEPS // 2):
        step(model, optimizers, **place)
    dcp.save({"model": model.state_dict(), "optimizer": optimizers}, checkpoint_id=folder)
    for _ in range(STEPS - STEPS // 2):
        step(model, optimizers, **place)
    weights = whole_weights(model)
    again = sharded(LAYOUTS[layout])
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()  # what a checkpoint does not load, is not there
    fresh = container(again, implementation)
    states = {"model": again.state_dict(), "optimizer": fresh}
    dcp.load(states, checkpoint_id=folder)
    again.load_state_dict(states["model"])
    for _ in range(STEPS - STEPS // 2):
        step(again, fresh, **place)
    resumed = whole_weights(again)
    return weights, all(torch.equal(resumed[name], value) for name, value in weights.items())


def by_hand() -> dict[str, Tensor]:
    model = build()
    named = list(model.named_parameters())
    norms = [parameter for name, parameter in named if "norm" in name]
    rest = [pair for pair in named if "norm" not in pair[0]]
    flora = Flora(rest, lr=LR, weight_decay=0.1, **SETTINGS)
    both = [torch.optim.AdamW(norms, **NORMS), flora]
    tokens = Samples().tokens
    for _ in range(STEPS):
        model(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    return whole_weights(model)


@pytest.mark.ranks(2)
def test_flora_beside_adamw_is_the_plain_loop_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    expected = by_hand()
    start = {name: p.detach() for name, p in build().named_parameters()}
    for runs in pool_of(2)(all_trained_and_resumed, str(tmp_path)):
        for case, (weights, is_equal) in runs.items():
            assert is_equal, case
            for name, value in expected.items():
                moved = (value - start[name]).norm()
                assert (weights[name] - value).norm() < 1e-5 * moved, (case, name)


def test_the_clipping_of_torchtitans_trainer_refuses_sketches() -> None:
    from torchtitan.distributed.utils import clip_grad_norm_

    import flora_dist.torchtitan

    model = build()
    (optimizer,) = flora_dist.torchtitan.default_flora(rank=4, block=16).build(model_parts=[model])
    flora_dist.attach(model, optimizer, "compressed")
    tokens = Samples().tokens
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(
        RuntimeError, match=r"torchtitan's training\.max_norm.*keep gradients dense"
    ):
        clip_grad_norm_(list(model.parameters()), 1.0)


def test_the_default_config_has_one_group_of_everything() -> None:
    import flora_dist.torchtitan

    config = flora_dist.torchtitan.default_flora(lr=2e-3, rank=4, block=16)
    model = build()
    (optimizer,) = config.build(model_parts=[model])
    assert type(optimizer) is Flora
    (group,) = optimizer.param_groups
    assert (group["lr"], group["rank"]) == (2e-3, 4)
    assert {row.name for row in optimizer.report().rows} == set(dict(model.named_parameters()))
