# SPDX-License-Identifier: Apache-2.0
"""Optimizers on each way of holding parameters, and what goes wrong on one rank of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flora_dist import Flora
from flora_dist.core.comm.groups import Peers
from flora_dist.core.consistency import compare as consistency
from tests.battery.flat import layout_of
from tests.optimizer import runs

State = dict[str, Any]
NAMES = tuple(name for name in runs.SHAPES if name != "scale")  # 0-D tensors have no shards


@dataclass
class HeldRun:
    """An optimizer, and how to hand it the same gradients on every rank."""

    optimizer: Flora
    set_gradients: Callable[[int], None]
    states: Callable[[], dict[str, State]]
    """What this rank keeps, by name."""

    def train(self, steps: range) -> None:
        for step in steps:
            self.set_gradients(step)
            self.optimizer.step()


def whole(dtype: torch.dtype = torch.float64, **settings: Any) -> HeldRun:
    """Plain tensors, as under DDP."""
    parameters = runs.build({name: runs.SHAPES[name] for name in NAMES}, dtype)
    optimizer = Flora(parameters.items(), **{**runs.SETTINGS, **settings})
    return HeldRun(
        optimizer,
        lambda step: runs.set_gradients(parameters, step),
        lambda: {name: optimizer.state[p] for name, p in parameters.items()},
    )


def rows(**settings: Any) -> HeldRun:
    """FSDP2: rows or experts over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return _sharded(mesh, lambda _: [Shard(0)], settings)


def rows_of_replicas(**settings: Any) -> HeldRun:
    """HSDP on four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return _sharded(mesh, lambda _: [Replicate(), Shard(0)], settings)


def columns(**settings: Any) -> HeldRun:
    """Tensor parallelism by columns, of what has two dimensions; the rest is replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return _sharded(mesh, lambda p: [Shard(1) if p.ndim == 2 else Replicate()], settings)


def spans(**settings: Any) -> HeldRun:
    """As ZeRO and FSDP1: one line of all parameters, cut inside rows, blocks and experts."""
    shapes = {name: runs.SHAPES[name] for name in NAMES}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bounds = [0, *(total * place // world_size + 3 for place in range(1, world_size)), total]
    mine = slice(bounds[rank], bounds[rank + 1])
    line = torch.cat([p.detach().flatten() for p in runs.build(shapes).values()])
    flat = nn.Parameter(line[mine].clone())
    optimizer = Flora([flat], **{**runs.SETTINGS, **settings})
    optimizer.attach_layout(layout_of(flat, shapes, bounds))

    def set_gradients(step: int) -> None:
        drawn = [runs.draw(n, step, shape, line.dtype).flatten() for n, shape in shapes.items()]
        flat.grad = torch.cat(drawn)[mine].clone()

    return HeldRun(optimizer, set_gradients, lambda: dict(optimizer.state[flat]))


def _sharded(
    mesh: DeviceMesh, placements: Callable[[nn.Parameter], list[Any]], settings: dict[str, Any]
) -> HeldRun:
    plain = runs.build({name: runs.SHAPES[name] for name in NAMES})
    sharded = {
        name: nn.Parameter(distribute_tensor(p.detach(), mesh, placements(p)))
        for name, p in plain.items()
    }
    optimizer = Flora(sharded.items(), **{**runs.SETTINGS, **settings})

    def set_gradients(step: int) -> None:
        for name, parameter in sharded.items():
            drawn = runs.draw(name, step, parameter.shape, parameter.dtype)
            parameter.grad = distribute_tensor(
                drawn, mesh, parameter.placements, src_data_rank=None
            )

    return HeldRun(
        optimizer,
        set_gradients,
        lambda: {name: optimizer.state[p] for name, p in sharded.items()},
    )


RUNS: dict[str, Callable[..., HeldRun]] = {
    "whole": whole,
    "rows": rows,
    "rows of replicas": rows_of_replicas,
    "columns": columns,
    "spans": spans,
}


def refusal(held: HeldRun, peers: Peers = None) -> str:
    """What the check says on this rank; empty if it agrees."""
    try:
        held.optimizer.check_consistency(peers)
    except ValueError as error:
        return str(error)
    return ""


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flip(tensor: Tensor, place: int, bit: int = 0) -> None:
    """Change one bit of one element."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.no_grad():
        flat = local(tensor).view(integers[tensor.element_size()]).view(-1)
        flat[place] = flat[place] ^ (1 << bit)


@contextmanager
def without(mechanism: str) -> Iterator[None]:
    """Break a mechanism of the check; a field's name: leave that field out."""
    kept: dict[str, Any] = {}

    def put(attribute: str, value: Any) -> None:
        kept[attribute] = getattr(consistency, attribute)
        setattr(consistency, attribute, value)

    if mechanism in consistency.FIELDS:
        digest, place = consistency._digest, consistency.FIELDS.index(mechanism)
        calls: list[Any] = []

        def blind(field: Any) -> int:
            calls.append(field)
            return 0 if (len(calls) - 1) % len(consistency.FIELDS) == place else digest(field)

        put("_digest", blind)
    elif mechanism == "messages":
        put("smallest", lambda numbers_S, _: numbers_S)
    elif mechanism:
        original = getattr(consistency, mechanism)
        assert callable(original)
        put(mechanism, lambda *_: {})
    try:
        yield
    finally:
        for attribute, value in kept.items():
            setattr(consistency, attribute, value)
