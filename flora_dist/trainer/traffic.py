# SPDX-License-Identifier: Apache-2.0
"""Bytes a process sends, counted at the collectives as they pass torch's dispatcher.

DDP's C++ reducer, FSDP2, DTensor and plain calls all go through the same `c10d` operators. What is
counted is the payload of the bandwidth-optimal (ring) algorithms for w processes: an all-reduce of
S bytes sends 2 (w-1)/w S, a reduce-scatter or all-gather (w-1)/w of the whole buffer. Frames,
acknowledgements and what another algorithm would send on top are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_Count = Callable[[Sequence[Any]], int]


def _size(value: Any) -> int:
    """Bytes of a tensor or of all tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.itemsize
    if isinstance(value, list | tuple):
        return sum(_size(item) for item in value)
    return 0


def _first(args: Sequence[Any]) -> int:
    return _size(args[0])


def _second(args: Sequence[Any]) -> int:
    return _size(args[1])


# Operator -> (passes over the ring, bytes of the whole buffer). Arguments come as
# (output, input, group, ...) or (tensors, group, ...).
_IN_PLACE: dict[str, tuple[int, _Count]] = {
    "allreduce_": (2, _first),
    "allreduce_coalesced_": (2, _first),
    "broadcast_": (1, _first),
    "reduce_": (1, _first),
    "allgather_": (1, _first),
    "_allgather_base_": (1, _first),
    "allgather_coalesced_": (1, _first),
    "allgather_into_tensor_coalesced_": (1, _first),
    "reduce_scatter_": (1, _second),
    "_reduce_scatter_base_": (1, _second),
    "reduce_scatter_tensor_coalesced_": (1, _second),
    "alltoall_": (1, _second),
    "alltoall_base_": (1, _second),
}
# Functional collectives take (input, ..., group name); their buffer is the input, which an
# all-gather multiplies by the group's size.
_FUNCTIONAL: dict[str, int] = {
    "all_reduce": 2,
    "all_reduce_": 2,
    "all_reduce_coalesced": 2,
    "broadcast": 1,
    "broadcast_": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_tensor_coalesced": 1,
    "all_to_all_single": 1,
}
_FUNCTIONAL_GATHERS = frozenset({"all_gather_into_tensor", "all_gather_into_tensor_coalesced"})


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what this process sends while it is entered.

    >>> with Traffic() as traffic:
    ...     _ = torch.ones(3) + 1
    >>> traffic.bytes_sent
    0
    """

    bytes_sent: int
    """Payload this process has sent so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_sent = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor first: what it sends for this operator comes by later
        if func.namespace in {"c10d", "_c10d_functional"}:
            self.bytes_sent += _sent(func.namespace, func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def _sent(namespace: str, name: str, args: Sequence[Any]) -> int:
    if namespace == "c10d" and name in _IN_PLACE:
        passes, count = _IN_PLACE[name]
        return _ring(passes, count(args), _group_size(args))
    if name in _FUNCTIONAL:
        return _ring(_FUNCTIONAL[name], _first(args), _named_group_size(args))
    if name in _FUNCTIONAL_GATHERS:
        size = _named_group_size(args)
        return _ring(1, _first(args) * size, size)
    return 0  # barriers, waits: no payload


def _ring(passes: int, whole: int, size: int) -> int:
    return passes * (size - 1) * whole // size


def _group_size(args: Sequence[Any]) -> int:
    """Size of the process group among an operator's arguments."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            return dist.ProcessGroup.unbox(arg).size()  # the group comes before the reduce op
    raise AssertionError("a c10d collective without a process group")


def _named_group_size(args: Sequence[Any]) -> int:
    # Private, and the only way from the name, always the last argument, to the group.
    return int(c10d._resolve_process_group(args[-1]).size())  # type: ignore[attr-defined]
