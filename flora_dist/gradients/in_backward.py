# SPDX-License-Identifier: Apache-2.0
"""Step each parameter during backward, as soon as its gradient is complete, and free that.

Where backward holds one layer's gradient at a time, the step needs no more. On one process each
parameter is stepped by itself; under FSDP2 those of a module, which it has reduced together, so
that a module costs one message. Updates are those of a step after backward, bit for bit: no
parameter's depends on another's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from flora_dist.core.parameters.registry import takes_part
from flora_dist.flora import Flora
from flora_dist.gradients.cycle import Gradients

_attached: WeakKeyDictionary[Flora, InBackward] = WeakKeyDictionary()


def step_in_backward(model: nn.Module, optimizer: Flora) -> InBackward:
    """Step each parameter in backward, so that only one layer's gradients are ever there.

    The loop stays as it is: ``backward()``, ``optimizer.step()``, ``zero_grad()``. The step ends
    what backward has begun, and steps what had no complete gradient. Call this on every rank, after
    sharding and after ``attach``. To accumulate, keep gradients as sketches (``attach``) and put
    all micro-batches but the last into ``accumulating()``.

    Args:
        model: plain, FSDP2, HSDP, tensor parallel; with sketches on one process, or at "sharded".
        optimizer: over its parameters.

    Returns:
        A handle: ``accumulating()``, ``remove()``.

    Raises:
        TypeError: the optimizer is not Flora.
        ValueError: a model whose gradients are not complete in backward (DDP, DeepSpeed, FSDP1,
            sketches that are averaged at the step), ``skip_nonfinite``, or a second call.
    """
    if not isinstance(optimizer, Flora):
        raise TypeError(
            f"step_in_backward needs a Flora; got {type(optimizer).__name__}. Pass the optimizer "
            "inside, if a framework has wrapped it."
        )
    if optimizer in _attached:
        raise ValueError(
            "an optimizer can be stepped in backward once; this one is already. Call remove() on "
            "its handle first."
        )
    _check_host(model)
    _check_sketches(optimizer)
    if not optimizer.state:
        optimizer.take_names(model)
    handle = InBackward(model, optimizer)
    _attached[optimizer] = handle
    return handle


def _check_host(model: nn.Module) -> None:
    """Refuse frameworks whose hooks come before the gradient is complete."""
    modules = list(model.modules())
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        raise ValueError(
            "DDP holds buckets of all gradients from its construction on, and hands out their mean "
            "when backward is over: stepping in backward would free nothing. Use FSDP2 "
            '(fully_shard), or attach(model, optimizer, "compressed").'
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "FSDP1 reduces the flat gradient of a whole unit and shows no parameter's own in "
            "backward. Use FSDP2 (fully_shard) to step in backward."
        )
    if hasattr(model, "zero_optimization"):
        raise ValueError(
            "a DeepSpeed engine averages gradients in buckets and steps flat partitions of them "
            'after backward; it cannot step in backward. Set "flora": {"gradients": "compressed"} '
            "in its config, which keeps sketches in place of gradients, or use FSDP2."
        )


def _check_sketches(optimizer: Flora) -> None:
    source = optimizer.gradients
    if not isinstance(source, Gradients):
        return
    if source.level == "fused":
        raise ValueError(
            "fused layers form no gradient, so that none is complete before the step; "
            "gradients='fused' leaves nothing to free in backward. Use attach(model, optimizer, "
            '"compressed"), or do not call step_in_backward().'
        )
    if source.needs_others:
        raise ValueError(
            f"sketches at gradients={source.level!r} are averaged over ranks once per step, after "
            'backward, and hold no whole gradient until then. Use gradients="sharded", or do not '
            "call step_in_backward()."
        )


class _Unit:
    """Parameters that are stepped together, once the gradients of all have come."""

    def __init__(self, optimizer: Flora, tensors: Sequence[Tensor]) -> None:
        self._optimizer, self._tensors = ref(optimizer), tensors
        self._arrived: set[int] = set()

    def forget(self) -> None:
        """The step is done."""
        self._arrived.clear()

    def arrived(self, tensor: Tensor) -> None:
        """A gradient is complete; with the last of them, step.

        Raises:
            RuntimeError: this parameter has been stepped already.
        """
        optimizer = self._optimizer()
        if optimizer is None or tensor.grad is None:
            return
        if id(tensor) in optimizer.ahead.tensor_ids:
            raise RuntimeError(
                "a parameter is stepped once per step; a gradient of one of shape "
                f"{tuple(tensor.shape)} has come after it was stepped in backward. Call "
                "optimizer.step() after each backward, and put all micro-batches but the last into "
                "the handle's accumulating()."
            )
        self._arrived.add(id(tensor))
        if len(self._arrived) == len(self._tensors):
            optimizer.step_ahead(self._tensors)
            for each in self._tensors:
                each.grad = None


class InBackward:
    """An optimizer that is stepped in backward."""

    def __init__(self, model: nn.Module, optimizer: Flora) -> None:
        """Hooks are in place afterwards."""
        optimizer.ahead.is_attached = True
        self._optimizer = ref(optimizer)
        self._accumulates = False
        own = {id(slot.tensor): slot.tensor for slot in optimizer.slots() if takes_part(slot)}
        self._units = [_Unit(optimizer, tensors) for tensors in _together(model, own)]
        self._hooks: list[RemovableHandle] = []
        for unit in self._units:
            self._hooks += [_hook(tensor, self, unit) for tensor in unit._tensors]
        self._hooks.append(optimizer.register_step_post_hook(self._forget))

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around each micro-batch but the last: its gradients stay, as sketches if attached."""
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    @property
    def is_accumulating(self) -> bool:
        """Whether gradients that arrive now are not the last of their step."""
        return self._accumulates

    def remove(self) -> None:
        """Step after backward again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        optimizer = self._optimizer()
        if optimizer is not None and _attached.get(optimizer) is self:
            optimizer.ahead.is_attached = False
            del _attached[optimizer]

    def _forget(self, *_: Any) -> None:
        for unit in self._units:
            unit.forget()


def _hook(tensor: Any, handle: InBackward, unit: _Unit) -> RemovableHandle:
    """On the complete gradient of a tensor; torch's method has no types."""
    registered: RemovableHandle = tensor.register_post_accumulate_grad_hook(
        partial(_arrived, ref(handle), ref(unit))
    )
    return registered


@torch.no_grad()
def _arrived(handle: ref[InBackward], unit: ref[_Unit], tensor: Tensor) -> None:
    """Weak, for FSDP2 holds weights where the collector of cycles does not look."""
    alive, own = handle(), unit()
    if alive is not None and own is not None and not alive.is_accumulating:
        own.arrived(tensor)


def _together(model: nn.Module, own: dict[int, Tensor]) -> Iterator[list[Tensor]]:
    """Which parameters are stepped together: one by one, or those that FSDP2 reduces together."""
    left = dict(own)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            found = [p for p in _of_fsdp(module) if id(p) in left]
            if found:
                yield [left.pop(id(parameter)) for parameter in found]
    for tensor in left.values():
        yield [tensor]


def _of_fsdp(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module of FSDP2, without those of modules inside that are its own."""
    found = list(module._parameters.values())
    for child in module.children():
        if not isinstance(child, FSDPModule):
            found += _of_fsdp(child)
    return list({id(p): p for p in found if p is not None}.values())
