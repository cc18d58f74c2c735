# SPDX-License-Identifier: Apache-2.0
"""Processes: who takes part, over which mesh, and how the model is spread over them."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import DistributedDataParallel

from flora_dist.cluster.local_store import local_store
from flora_dist.trainer.config import BackendConfig, Config
from flora_dist.trainer.failure import Failed, Mistake, Store, has_lost_peers, is_first
from flora_dist.trainer.rendezvous import fresh_store, has_agent_store
from flora_dist.trainer.replicated import Spread, World, autocast, over
from flora_dist.trainer.sharded import fsdp1, fsdp2, hsdp
from flora_dist.world import is_of_this_machine, read_world, timeout_minutes

DEFAULT_TIMEOUT_MINUTES = 10.0

# The buffers are the rotary tables: constants, equal everywhere, so no forward pass sends them.
# torch 2.13 renamed the argument; older ones do not know the new name.
_NO_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)

# New in torch 2.14, where the older, private name is deprecated.
_set_timeout: Callable[[timedelta, dist.ProcessGroup], None] = (
    getattr(dist, "set_timeout", None) or c10d._set_pg_timeout
)


def find_world(config: BackendConfig) -> World:
    """The world that the launcher describes in the environment, or this process alone."""
    place = read_world(os.environ)
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "backend.device cuda needs a CUDA device; torch sees none on this machine. Use auto "
            "or cpu."
        )
    local = place.local_rank
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"each process needs a CUDA device of its own; process {local} of this machine finds "
            f"only {torch.cuda.device_count()}. Start fewer processes, or set backend.device: cpu."
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return World(process_rank=place.process_rank, size=place.size, device=device)


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

    Raises:
        Mistake: a ValueError of the block; it says whether this process was the first to fail.
        Failed: any other exception, likewise, or the loss of another process.
    """
    if config.name == "none":
        yield
        return
    kind = "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        # What rests on the CPU is summed there: norms, and AdamW's clipping.
        kind = "cpu:gloo,cuda:nccl" if config.cpu_offload else "nccl"
    store: Store | None = None
    try:
        store = _open_group(kind, world, timeout_of(config))
        wait_for_all()  # every process has passed its checks: from here on files may be written
        yield
    except Exception as error:
        if has_lost_peers(error):
            # The group stays open: closing it may wait for those that are lost.
            raise Failed(first=False, lost=True) from error
        first = store is None or is_first(store)
        _close_group()
        if isinstance(error, ValueError):
            raise Mistake(str(error), first=first) from error
        raise Failed(first=first, lost=False) from error
    except BaseException:
        _close_group()
        raise
    _close_group()


def _open_group(kind: str, world: World, timeout: timedelta) -> Store:
    """Enter the default group; the store in which its processes met."""
    rank, size, place = world.process_rank, world.size, read_world(os.environ)
    if has_agent_store():
        met = fresh_store(rank, size, timeout)
        dist.init_process_group(kind, store=met, rank=rank, world_size=size, timeout=timeout)
    elif is_of_this_machine(place.address):
        met = local_store(place, timeout)
        dist.init_process_group(kind, store=met, rank=rank, world_size=size, timeout=timeout)
    elif "WORLD_SIZE" in os.environ:
        dist.init_process_group(kind, timeout=timeout)
    else:
        own = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(kind, store=own, rank=0, world_size=1, timeout=timeout)
    group = dist.group.WORLD
    assert group is not None
    store: Store = group.get_group_store()
    return store


def _close_group() -> None:
    """Close all groups, and see that their threads have ended: no interpreter may end before them.

    A group that anything still refers to keeps its threads. Models, optimizers and hooks refer to
    each other in circles, and DTensor remembers its results by meshes, which hold groups.
    """
    if dist.is_initialized():
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # torch's, without types
        gc.collect()
        dist.destroy_process_group()


def timeout_of(config: BackendConfig) -> timedelta:
    """How long a process waits for another before it gives up: as the config or the launch says."""
    minutes = config.timeout_minutes or timeout_minutes(os.environ) or DEFAULT_TIMEOUT_MINUTES
    return timedelta(minutes=minutes)


def bound_waits(config: BackendConfig) -> None:
    """Give every process group of this process the run's timeout.

    Groups made after the default one, by meshes and by DeepSpeed, start with torch's: 30 minutes.
    """
    if dist.is_initialized():
        for group in c10d._world.pg_map:  # private in torch 2.11 to 2.14
            _set_timeout(timeout_of(config), group)


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
    """Put the model on the device and spread it as the backend says; not for `deepspeed`."""
    return _BACKENDS[config.backend.name](model, config, world)


def _alone(model: nn.Module, config: Config, world: World) -> Spread:
    return over(
        model,
        config,
        module=model.to(world.device),
        synchronising=lambda _: nullcontext(),
        arithmetic=autocast(config, world),
    )


def _ddp(model: nn.Module, config: Config, world: World) -> Spread:
    module = DistributedDataParallel(
        model.to(world.device), gradient_as_bucket_view=True, **_NO_BUFFERS
    )
    return over(
        model,
        config,
        module=module,
        synchronising=lambda last: nullcontext() if last else module.no_sync(),
        arithmetic=autocast(config, world),
    )


_BACKENDS: dict[str, Callable[[nn.Module, Config, World], Spread]] = {
    "none": _alone,
    "ddp": _ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
}
