# SPDX-License-Identifier: Apache-2.0
"""Tensors that are still in a safetensors file, and what is computed from them.

transformers renames, stacks and splits what a file holds until it fits a network. A `Promised`
tensor goes through all of that without memory: operators on it are noted down. Whoever asks for its
rows in the end reads these rows alone where it is a tensor of a file, cast or not; any other is
computed from whole tensors first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from flora_dist.trainer.place import WHOLE, Place, Unfit, kept

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_Read = Callable[[Place], Tensor]


class Promised(Tensor):
    """A tensor of known shape and dtype without memory."""

    rows_in: _Read
    """Reads or computes the rows that belong to a place."""

    @staticmethod
    def __new__(cls: type[Promised], shape: torch.Size, dtype: torch.dtype, _: _Read) -> Promised:
        """The outside of the tensor; it says that it is on the CPU, where it will be."""
        made: Promised = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("cpu")
        )
        return made

    def __init__(self, _shape: torch.Size, _dtype: torch.dtype, read: _Read) -> None:
        super().__init__()
        self.rows_in = read

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch gives it without an argument for cls
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note an operator down, or do it where it gives no tensor.

        Raises:
            Unfit: it changes a tensor in place.
        """
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _SAME and isinstance(first, cls):
            return cls(first.shape, first.dtype, first.rows_in)
        if func is torch.ops.aten._to_copy.default and isinstance(first, cls):
            return _cast(first, kwargs.get("dtype") or first.dtype)
        if func._schema.is_mutable:
            raise Unfit(f"{func.__name__} changes a tensor that is still in a file")
        if any(str(each.type) not in {"Tensor", "Tensor[]"} for each in func._schema.returns):
            return func(*_in_memory(args), **_in_memory(kwargs))
        return _noted(func, args, kwargs)


def promises_of(file: Path) -> dict[str, Tensor]:
    """Each tensor of a safetensors file, by its name there; nothing but shapes is read."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            shape = torch.Size(opened.get_slice(name).get_shape())
            empty = opened.get_slice(name)[0:0] if shape else opened.get_tensor(name)
            found[name] = Promised(shape, empty.dtype, _reader(file, name, shape))
    return found


def _reader(file: Path, name: str, shape: torch.Size) -> _Read:
    from safetensors import safe_open

    def read(place: Place) -> Tensor:
        # Opened anew for each tensor: pages of a mapped file count as the process's memory until
        # it is closed.
        with safe_open(file, framework="pt") as opened:
            if not shape:
                scalar: Tensor = opened.get_tensor(name)
                return place.part(scalar, shape).clone()
            rows: Tensor = opened.get_slice(name)[place.cut(shape)]
            return place.part(rows, shape).clone()

    return read


def _cast(tensor: Promised, dtype: torch.dtype) -> Promised:
    return Promised(tensor.shape, dtype, lambda place: tensor.rows_in(place).to(dtype))


def _noted(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator will give."""
    shapes = func(*tree_map_only(Tensor, _shape, args), **tree_map_only(Tensor, _shape, kwargs))
    leaves, structure = tree_flatten(shapes)

    def reading(number: int) -> _Read:
        def read(place: Place) -> Tensor:
            whole = tree_flatten(func(*_in_memory(args), **_in_memory(kwargs)))[0][number]
            assert isinstance(whole, Tensor)
            return kept(place, whole).clone()  # else all of it would stay

        return read

    noted = [Promised(leaf.shape, leaf.dtype, reading(i)) for i, leaf in enumerate(leaves)]
    return tree_unflatten(noted, structure)


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _in_memory(values: Any) -> Any:
    return tree_map_only(Promised, lambda each: each.rows_in(WHOLE), values)
