# SPDX-License-Identifier: Apache-2.0
"""Processes: who takes part, over which mesh, and how the model is spread over them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from flora_dist.trainer.config import BackendConfig, Config

# The buffers are the rotary tables: constants, equal everywhere, so no forward pass sends them.
# torch 2.13 renamed the argument; older ones do not know the new name.
_NO_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of this run, as one of them sees it."""

    process_rank: int
    """Number of this process, from 0; process 0 speaks and writes."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""

    @property
    def speaks(self) -> bool:
        """Whether this is the process that prints and writes the run's files."""
        return self.process_rank == 0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A model spread over the processes."""

    module: nn.Module
    """What is called: forward runs through it."""
    synchronising: Callable[[bool], AbstractContextManager[object]]
    """Context of one micro-batch; with False, gradients stay on the process."""
    arithmetic: Callable[[], AbstractContextManager[object]]
    """Context of a forward pass that sets its precision."""
    free: Callable[[], None] = lambda: None
    """Free whole weights that a forward pass without a backward pass has left behind."""


def find_world(config: BackendConfig) -> World:
    """The world torchrun describes in the environment, or this process alone."""
    process_rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "backend.device cuda needs a CUDA device; this machine shows none. Use auto or cpu."
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"each process needs a CUDA device of its own; process {local} of this machine has "
            f"none among {torch.cuda.device_count()}. Start fewer, or set backend.device: cpu."
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return World(process_rank=process_rank, size=size, device=device)


def check_world(config: Config, size: int) -> None:
    """Compare the number of processes with the mesh and the batch.

    Raises:
        ValueError: `none` on several processes, a mesh of another size, or a global batch that
            the processes cannot share equally.
    """
    backend, train = config.backend, config.train
    if backend.name == "none" and size != 1:
        raise ValueError(
            f"backend none runs on one process; there are {size}. Set backend.name to ddp, fsdp2 "
            "or hsdp, or start one process."
        )
    if backend.name == "hsdp":
        replicate, shard = backend.replicate or 0, backend.shard or 0
        if replicate * shard != size:
            raise ValueError(
                f"the hsdp mesh must hold every process; backend.replicate={replicate} x "
                f"backend.shard={shard} is {replicate * shard}, there are {size} processes. "
                "Change the mesh or the number of processes."
            )
    together = train.micro_batch * size
    if train.global_batch % together:
        raise ValueError(
            "train.global_batch must be a multiple of train.micro_batch times the number of "
            f"processes; {train.global_batch} is not one of {train.micro_batch} x {size} = "
            f"{together}. Change one of the three."
        )


@contextmanager
def process_group(config: BackendConfig, world: World) -> Iterator[None]:
    """The default process group, where the backend needs one; closed at the end.

    A single process gets a group over a store in its own memory: no port, no file.
    """
    if config.name == "none":
        yield
        return
    kind = "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        kind = "nccl"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(kind)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(kind, store=store, rank=0, world_size=1)
    try:
        wait_for_all()  # every process has passed its checks: from here on files may be written
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Sum of the processes' tensors, in place; the tensor itself where there is no group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def largest_over_processes(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def spread(model: nn.Module, config: Config, world: World) -> Spread:
    """Put the model on the device and spread it as the backend says."""
    return _BACKENDS[config.backend.name](model, config, world)


def _alone(model: nn.Module, config: Config, world: World) -> Spread:
    return Spread(
        module=model.to(world.device),
        synchronising=lambda _: nullcontext(),
        arithmetic=_autocast(config, world),
    )


def _ddp(model: nn.Module, config: Config, world: World) -> Spread:
    module = DistributedDataParallel(
        model.to(world.device), gradient_as_bucket_view=True, **_NO_BUFFERS
    )
    return Spread(
        module=module,
        synchronising=lambda last: nullcontext() if last else module.no_sync(),
        arithmetic=_autocast(config, world),
    )


def _fsdp2(model: nn.Module, config: Config, world: World) -> Spread:
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return _fully_sharded(model, config, mesh)


def _hsdp(model: nn.Module, config: Config, world: World) -> Spread:
    shape = (config.backend.replicate or 1, config.backend.shard or 1)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return _fully_sharded(model, config, mesh)


def _fully_sharded(model: nn.Module, config: Config, mesh: DeviceMesh) -> Spread:
    policy = MixedPrecisionPolicy()
    if config.train.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reshard = config.backend.reshard_after_forward
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root's weights (embedding, head) are needed again at once: freeing them gains nothing.
    root = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    @contextmanager
    def synchronising(last: bool) -> Iterator[None]:
        root.set_requires_gradient_sync(last)
        yield

    def free() -> None:
        # Only a backward pass reshards what the forward pass kept. Until then the model's
        # parameters are the whole ones, and neither optimizer nor checkpoint knows those.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    return Spread(module=model, synchronising=synchronising, arithmetic=nullcontext, free=free)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The transformer's layers: the children of the ModuleList that holds most weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    return list(max(lists, key=lambda layers: sum(map(_weights, layers))))


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _autocast(config: Config, world: World) -> Callable[[], AbstractContextManager[object]]:
    if config.train.precision == "float32":
        return nullcontext
    return lambda: torch.autocast(world.device.type, dtype=torch.bfloat16)


_BACKENDS: dict[str, Callable[[nn.Module, Config, World], Spread]] = {
    "none": _alone,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
}
