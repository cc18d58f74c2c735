# SPDX-License-Identifier: Apache-2.0
"""Who sums with whom: the ranks of some axes of a device mesh."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flora_dist.core.protocols import Reducer

T = TypeVar("T")
Peers: TypeAlias = "dist.ProcessGroup | DeviceMesh | Sequence[dist.ProcessGroup] | None"
"""Whom to talk to: a group, a mesh, groups that reach everyone one after the other as the axes of a
mesh do, or None: the default group."""
_kept: WeakKeyDictionary[dist.ProcessGroup, dist.Work] = WeakKeyDictionary()
"""The last message of each group."""
_apart: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
"""For each group, the other one of its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshReducer:
    """Sums over the given axes of a mesh, one all-reduce each; compares by value."""

    mesh: DeviceMesh
    axes: tuple[int, ...]

    def sum_(self, message_S: Tensor) -> None:
        """Replace a flat message by its sum; every rank gets the same bits."""
        # With CPU offload the step runs on the CPU while the mesh's groups may only know the
        # accelerator; the message is small.
        device = self.mesh.device_type
        there = message_S if message_S.device.type == device else message_S.to(device)
        for axis in self.axes:
            all_reduce_(there, self.mesh.get_group(axis))
        if there is not message_S:
            message_S.copy_(there)

    def exchange(self, sent_S: Tensor, sizes: Mapping[int, int]) -> Tensor:
        """Never asked: with column shards every rank holds pieces of the same rows."""
        raise AssertionError(f"parts of a mesh sum their cuts; got {sizes} for {sent_S.shape}")

    @property
    def rank(self) -> int:
        """Place among the ranks of the mesh."""
        return self.mesh.get_rank()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReducer:
    """Sums over the ranks of a process group; compares by value."""

    group: dist.ProcessGroup

    def sum_(self, message_S: Tensor) -> None:
        """Replace a flat message by its sum; every rank gets the same bits."""
        there = message_S.to(group_device(message_S, self.group))
        all_reduce_(there, self.group)
        if there is not message_S:
            message_S.copy_(there)

    def exchange(self, sent_S: Tensor, sizes: Mapping[int, int]) -> Tensor:
        """Send each peer its share of a flat message; returns theirs, laid out alike."""
        there = sent_S.to(group_device(sent_S, self.group))
        received = torch.empty_like(there)
        splits = [sizes.get(peer, 0) for peer in range(dist.get_world_size(self.group))]
        sent = dist.all_to_all_single(
            received, there, splits, splits, group=self.group, async_op=there.is_cpu
        )
        _finish(sent, self.group)
        return received.to(sent_S.device)

    @property
    def rank(self) -> int:
        """Place in the group."""
        return dist.get_rank(self.group)


# New in torch 2.13, where the older name is deprecated.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def reduce_scatter(lines_WS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of the line (S,) that stands at this rank's place."""
    received_S = lines_WS.new_empty(lines_WS.shape[1])
    sent = _reduce_scatter(received_S, lines_WS.view(-1), group=group, async_op=lines_WS.is_cpu)
    _finish(sent, group)
    return received_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A message under way."""

    sent_S: Tensor
    """Held until all of it has left."""
    received_S: Tensor
    work: dist.Work
    group: dist.ProcessGroup
    device: torch.device
    """Of what was handed over."""

    def wait(self) -> Tensor:
        """What has arrived."""
        if self.received_S.is_cpu:
            _finish(self.work, self.group)
        else:
            self.work.wait()
        return self.received_S.to(self.device)


def begin_exchange(
    sent_S: Tensor, given: Sequence[int], taken: Sequence[int], group: dist.ProcessGroup
) -> Pending:
    """Begin an all-to-all of bytes: what the ranks of a group send this one, in their order.

    Args:
        sent_S: for each rank in order, as many bytes as ``given`` says; not to be written to.
        given: bytes for each rank.
        taken: bytes from each rank.
        group: who takes part; its messages are begun in one order on all ranks.
    """
    there_S = sent_S.to(group_device(sent_S, group))
    received_S = there_S.new_empty(sum(taken))
    work = dist.all_to_all_single(
        received_S, there_S, list(taken), list(given), group=group, async_op=True
    )
    assert work is not None
    return Pending(
        sent_S=there_S, received_S=received_S, work=work, group=group, device=sent_S.device
    )


def group_apart(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same ranks, whose messages stand in no order to those of ``group``.

    All of its ranks must call this; the same one for a second call.
    """
    apart = _apart.get(group)
    if apart is None:
        ranks = dist.get_process_group_ranks(group)
        apart = _apart[group] = dist.new_group(ranks, use_local_synchronization=True)
    return apart


def all_reduce_(
    message_S: Tensor,
    group: dist.ProcessGroup | None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> None:
    """Replace a flat message by its sum over the ranks of a group, or by what ``op`` makes."""
    _finish(dist.all_reduce(message_S, op=op, group=group, async_op=message_S.is_cpu), group)


def _finish(sent: dist.Work | None, group: dist.ProcessGroup | None) -> None:
    """Wait for a message of CPU tensors, and hold it until the group's next one or its end.

    Others are in order on their stream, and are None here. Gloo's thread lets go of a message only
    after it has told us of its arrival. Were it the last to hold it, freeing the tensors would need
    the interpreter; one that is ending stops the thread right there, and the process dies:
    "terminate called without an active exception" (torch 2.13).
    """
    if sent is not None:
        sent.wait()
        _kept[group or c10d._get_default_group()] = sent


def any_process(flag: Tensor) -> bool:
    """Whether a flag () is set on any process of the default group, which must all call this."""
    count = flag.to(device=group_device(flag, None), dtype=torch.float32)
    all_reduce_(count, None)
    return bool(count.item() > 0)


def smallest(numbers_S: Tensor, peers: Peers) -> Tensor:
    """The smallest of each number over all peers, on whatever device their groups know."""
    for group in _groups(peers):
        numbers_S = numbers_S.to(group_device(numbers_S, group))
        all_reduce_(numbers_S, group, dist.ReduceOp.MIN)
    return numbers_S


def gather(mine: T, peers: Peers) -> list[T]:
    """What each of the peers gave, in an order that is the same on all."""
    known = [mine]
    for group in _groups(peers):
        known = [value for each in _gather_lists(known, group) for value in each]
    return known


def _gather_lists(mine: list[T], group: dist.ProcessGroup | None) -> list[list[T]]:
    """What ``dist.all_gather_object`` gives, by messages that can be held: see ``_finish``."""
    pickled = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    rank, device = dist.get_rank(group), group_device(pickled, group)
    sizes_W = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes_W[rank] = pickled.numel()
    all_reduce_(sizes_W, group)
    sizes = sizes_W.tolist()
    lines = torch.zeros(len(sizes), max(sizes), dtype=torch.uint8, device=device)
    lines[rank, : pickled.numel()] = pickled.to(device)
    all_reduce_(lines.view(-1), group)
    # From the ranks of this very run, as torch's own call does it.
    return [
        pickle.loads(line[:size].numpy().tobytes())
        for line, size in zip(lines.cpu(), sizes, strict=True)
    ]


def _groups(peers: Peers) -> Sequence[dist.ProcessGroup | None]:
    if isinstance(peers, DeviceMesh):
        return [peers.get_group(axis) for axis in range(peers.ndim)]
    return peers if isinstance(peers, Sequence) else [peers]


def place_of(reducer: Reducer | None) -> tuple[int, int]:
    """Which shard of how many a part is; parts of one place on several ranks are replicas."""
    if reducer is None:
        return 0, 1
    if isinstance(reducer, GroupReducer):
        return reducer.rank, dist.get_world_size(reducer.group)
    assert isinstance(reducer, MeshReducer)
    coordinate = reducer.mesh.get_coordinate()
    assert coordinate is not None, "this process is outside the mesh of its own parameter"
    place, sizes = 0, [reducer.mesh.size(axis) for axis in reducer.axes]
    for axis, size in zip(reducer.axes, sizes, strict=True):
        place = place * size + coordinate[axis]
    return place, math.prod(sizes)


def group_device(tensor: Tensor, group: dist.ProcessGroup | None) -> str:
    """The tensor's own, or the accelerator's where the group knows no other (CPU offload)."""
    if f"{tensor.device.type}:" in str(dist.get_backend_config(group)):
        return tensor.device.type
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "the group's backend knows no device of this machine"
    return accelerator.type


def has_peers() -> bool:
    """Whether there is a process group at all."""
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    """This process's rank in the default group; 0 where there is none."""
    return dist.get_rank() if has_peers() else 0


def process_count() -> int:
    """How many processes the default group has; 1 where there is none."""
    return dist.get_world_size() if has_peers() else 1
