# SPDX-License-Identifier: Apache-2.0
"""A small model and the runs that the tests of sketched gradients share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import flora_dist
from flora_dist import Flora
from flora_dist.core.comm.groups import MeshReducer
from flora_dist.gradients.attach import Handle
from flora_dist.gradients.cycle import Gradients
from flora_dist.gradients.flow import Flow

SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "rank": 2,
    "block": 8,
    "momentum": "flora",
    "kappa": 2,
    "state_dtype": "float32",
}
WIDTH = 20


class Small(nn.Module):
    """Two matrices that always train, one that a switch leaves out, norm and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 24)
        self.norm = nn.LayerNorm(24)
        self.extra = nn.Linear(24, 24, bias=False)
        self.last = nn.Linear(24, 16, bias=False)
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(index)
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, *, use_extra: bool = True) -> Tensor:
        hidden = self.norm(self.first(x)).tanh()
        if use_extra:
            hidden = hidden + self.extra(hidden)
        return self.last(hidden).square().mean()


def inputs(step: int, rows: int = 12) -> Tensor:
    """A step's inputs, the same in every process."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(500 + step))


def my_inputs(step: int, rows: int = 12) -> Tensor:
    """This rank's share of them."""
    return inputs(step, rows).chunk(dist.get_world_size())[dist.get_rank()]


def attached(
    model: nn.Module, level: str = "compressed", settings: dict[str, Any] | None = None, **more: Any
) -> tuple[Flora, Handle]:
    """All numbers in full unless ``more`` says otherwise: tests compare them with exact ones."""
    optimizer = Flora(model.named_parameters(), **{**SETTINGS, **(settings or {})})
    return optimizer, flora_dist.attach(model, optimizer, level, **{"gradient_bits": 32, **more})


def on_ddp(**options: Any) -> tuple[nn.Module, Small]:
    model = Small()
    return DistributedDataParallel(model, **options), model


def on_fsdp2(**options: Any) -> tuple[nn.Module, Small]:
    model = Small()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model, model


HOSTS: dict[str, Callable[..., tuple[nn.Module, Small]]] = {"ddp": on_ddp, "fsdp2": on_fsdp2}
"""How to spread the model: what is called, and the module inside."""


@contextmanager
def formed() -> Iterator[list[str]]:
    """Names of the parameters whose full gradients arrive meanwhile."""
    names: list[str] = []
    take = Gradients.take

    def noted(self: Gradients, flow: Flow, gradient: Tensor) -> None:
        names.append(flow.part.name)
        take(self, flow, gradient)

    Gradients.take = noted  # type: ignore[method-assign]
    try:
        yield names
    finally:
        Gradients.take = take  # type: ignore[method-assign]


@contextmanager
def summed() -> Iterator[list[int]]:
    """Numbers of each message that steps sum over the shards of DTensors meanwhile."""
    sizes: list[int] = []
    sum_ = MeshReducer.sum_

    def noted(self: MeshReducer, message_S: Tensor) -> None:
        sizes.append(message_S.numel())
        sum_(self, message_S)

    MeshReducer.sum_ = noted  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        MeshReducer.sum_ = sum_  # type: ignore[method-assign]


def refused(action: Callable[[], Any], kind: type[Exception]) -> str:
    """The message of an error that must come; rank bodies cannot use pytest."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
