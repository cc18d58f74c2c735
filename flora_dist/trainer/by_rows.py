# SPDX-License-Identifier: Apache-2.0
"""A network drawn from the seed of which a process keeps its own part alone: FSDP2, HSDP, ZeRO-3.

Weights are those of the whole network, bit for bit: a process makes every draw that `build_model`
makes, in the same order, into memory for one parameter at a time, keeps its part of that and frees
the rest. The network itself stands on the meta device until it is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.place import Drawn, Place, Rows, Unfit, kept
from flora_dist.trainer.replicated import local_part

_OVERWRITES = ("normal_", "uniform_", "fill_", "zero_", "copy_", "random_")


def draw_rows(network: Any, place: Place, *, seed: int, dtype: torch.dtype) -> Drawn:
    """The network of `build_model`, of which only what a place keeps gets memory.

    Raises:
        RuntimeError: it cannot be initialised parameter after parameter. The seed is used up.
    """
    with needs_train_extra():
        from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    drawing = _Drawing(place, dtype)
    with _parameters_on_meta(), drawing:
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            network, dtype=torch.float32, trust_remote_code=False
        )
    rows = {name: drawing.rows_of(name, p) for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Drawn(model=model.train(), rows=rows)


def fill_(module: nn.Module, rows: Rows, *, resting: torch.device, device: torch.device) -> None:
    """Give a sharded network memory and its weights; ``rows`` are freed by it.

    Args:
        module: whose parameters have no memory yet.
        rows: this process's, by name.
        resting: where shards are between two uses.
        device: that computes; buffers are there.
    """
    owned = [
        (owner, name, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    module.to_empty(device=resting)
    with torch.no_grad():
        for owner, name, buffer in owned:
            setattr(owner, name, buffer.to(device))
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, DTensor), name
            local, own = local_part(parameter), rows.pop(name)
            assert local.shape == own.shape, f"{name}: {local.shape} here, {own.shape} drawn"
            local.copy_(own)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules keep no memory of parameters; buffers are constants, and keep theirs."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    # mypy takes torch's method for one with two selves.
    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Lets operators write to parameters that have no memory: one of them has some at a time."""

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place, self._dtype = place, dtype
        self._kept: dict[torch.UntypedStorage, tuple[torch.Size, Tensor]] = {}
        self._open: torch.UntypedStorage | None = None
        self._whole = torch.empty(0)

    def rows_of(self, name: str, parameter: Tensor) -> Tensor:
        """What was drawn last of a parameter.

        Raises:
            Unfit: nothing, or in another shape.
        """
        self._close()
        shape, rows = self._kept.get(parameter.untyped_storage(), (None, torch.empty(0)))
        if shape != parameter.shape:
            raise Unfit(f"{name} gets its values elsewhere than in place")
        return rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if not (isinstance(target, Tensor) and target.is_meta and func._schema.is_mutable):
            return func(*args, **kwargs)
        storage = target.untyped_storage()
        if storage is not self._open:
            self._close()
            self._begin(func, target)
        args, kwargs = tree_map_only(Tensor, self._with_memory, (args, kwargs))
        func(*args, **kwargs)
        return target

    def _begin(self, func: Any, target: Tensor) -> None:
        """Give a parameter memory, whose old values its first operator must not ask for."""
        name = func.__name__.split(".")[0]
        is_whole = target.is_contiguous() and target.nbytes == target.untyped_storage().nbytes()
        if name not in _OVERWRITES or not is_whole:
            raise Unfit(f"{name} changes a parameter of shape {tuple(target.shape)} once more")
        self._open = target.untyped_storage()
        self._whole = torch.empty(target.shape, dtype=target.dtype)

    def _with_memory(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if tensor.untyped_storage() is not self._open:
            raise Unfit("one parameter is computed from another")
        return self._whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _close(self) -> None:
        """Keep the rows of what was drawn, and free the rest."""
        if self._open is not None:
            rows = kept(self._place, self._whole).to(self._dtype, copy=True)
            self._kept[self._open] = self._whole.shape, rows
            self._open, self._whole = None, torch.empty(0)
