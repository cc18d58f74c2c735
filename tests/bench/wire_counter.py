# SPDX-License-Identifier: Apache-2.0
"""What a process gives to collectives, and what for, counted as they pass torch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flora_dist.gradients.average import Averaging
from flora_dist.gradients.placeholder import CompressedGradient

# Operator -> (kind, which argument is the whole buffer). The arguments are (output, input, group,
# ...) or (tensors, group, ...).
_KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
}
_WITHOUT_PAYLOAD = {"barrier", "monitored_barrier_"}
_OF_WEIGHTS = {"all_gather", "broadcast"}

# What gloo moves, as measured by `python -m tests.bench.wire backend`: passes over the ring, each
# (w - 1) / w of the whole buffer from every one of w ranks. A reduce-scatter costs it two.
_PASSES = {"all_reduce": 2, "reduce_scatter": 2, "all_gather": 1, "all_to_all": 1}


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One collective of this process."""

    purpose: str
    """"sketches", "gradients" (the framework's own), "weights" or "messages" (of a step)."""
    kind: str
    elements: int
    """Of the whole buffer."""
    bytes: int
    ranks: int

    @property
    def cost(self) -> float:
        """Bytes that gloo sends from each rank for it, without frames.

        Raises:
            KeyError: a broadcast, which costs every rank something else.
        """
        return _PASSES[self.kind] * (self.ranks - 1) / self.ranks * self.bytes


class Collectives(TorchDispatchMode):
    """Collects payloads while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Payload] = []
        self._phase = "messages"

    @contextmanager
    def backward(self) -> Iterator[None]:
        """What is reduced meanwhile are gradients."""
        yield from self._during("gradients")

    @contextmanager
    def sketches(self) -> Iterator[None]:
        """What is sent by ``Averaging`` are sketches, wherever it is called."""
        run_, arrived_ = Averaging.run, Averaging.arrived

        def run(self_: Averaging) -> Any:
            with contextmanager(self._during)("sketches"):
                return run_(self_)

        def arrived(self_: Averaging, index: int) -> None:
            with contextmanager(self._during)("sketches"):
                arrived_(self_, index)

        Averaging.run, Averaging.arrived = run, arrived  # type: ignore[method-assign]
        try:
            yield
        finally:
            Averaging.run, Averaging.arrived = run_, arrived_  # type: ignore[method-assign]

    def elements(self, purpose: str) -> int:
        """Of all collectives for one purpose."""
        return sum(payload.elements for payload in self.sent if payload.purpose == purpose)

    def _during(self, phase: str) -> Iterator[None]:
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if DTensor in types or CompressedGradient in types:
            return NotImplemented  # what they send for this operator comes by later
        name = func.overloadpacket.__name__
        if func.namespace in {"c10d", "_c10d_functional"} and name not in _WITHOUT_PAYLOAD:
            kind, whole = _KINDS[name]  # a KeyError: an operator that nobody counts
            is_weights = kind in _OF_WEIGHTS and self._phase != "sketches"
            tensors = list(_tensors(args[whole]))
            self.sent.append(
                Payload(
                    purpose="weights" if is_weights else self._phase,
                    kind=kind,
                    elements=sum(tensor.numel() for tensor in tensors),
                    bytes=sum(tensor.numel() * tensor.itemsize for tensor in tensors),
                    ranks=_ranks(args),
                )
            )
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _ranks(args: Sequence[Any]) -> int:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            return dist.ProcessGroup.unbox(arg).size()  # it comes before the reduce op
    raise AssertionError("a collective without a process group")
