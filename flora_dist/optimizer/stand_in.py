# SPDX-License-Identifier: Apache-2.0
"""What stands in ``.grad`` of a parameter whose gradient is kept as sketches.

Nothing of it is there to read, so whoever asks for a norm, a scale or elements is refused: torch's
own clipping would else take the norm of the other parameters alone, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flora_dist.layouts.dtensor import local_of, shaped_like

_aten: Any = torch.ops.aten


class CompressedGradient(Tensor):
    """The shape of a gradient without its elements; adding to it adds to the sketches."""

    parameter_name: str
    add_to_sketch: Callable[[Tensor], None]
    drop_sketch: Callable[[], None]

    @staticmethod
    def __new__(
        cls: type[CompressedGradient],
        like: Tensor,
        *,
        name: str,
        add_to_sketch: Callable[[Tensor], None],
        drop_sketch: Callable[[], None],
    ) -> CompressedGradient:
        """Shaped like ``like``, with no memory."""
        made: CompressedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made.parameter_name, made.add_to_sketch, made.drop_sketch = name, add_to_sketch, drop_sketch
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name and shape; there are no elements to print."""
        del tensor_contents
        return f"CompressedGradient({self.parameter_name!r}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Autograd's ``grad += new`` and ``zero_()`` work; everything else raises."""
        del types, kwargs
        gradient = args[0]
        if func is _aten.add_.Tensor and isinstance(gradient, CompressedGradient):
            gradient.add_to_sketch(args[1])
            return gradient
        if func is _aten.zero_.default:
            gradient.drop_sketch()
            return gradient
        raise RuntimeError(
            f"the gradient of {_name_in(args)!r} is kept as sketches, so {func} cannot read it. "
            "For its norm call optimizer.grad_norm(), to clip optimizer.clip_grad_norm_(max_norm) "
            "(a trainer's own clipping off: max_grad_norm=0); in place of GradScaler use bf16; or "
            "leave gradients dense: attach nothing."
        )


def stands_in(gradient: Tensor | None) -> bool:
    """Whether ``.grad`` stands for sketches."""
    return gradient is not None and isinstance(local_of(gradient), CompressedGradient)


def stand_in_for(
    parameter: Tensor,
    *,
    name: str,
    add_to_sketch: Callable[[Tensor], None],
    drop_sketch: Callable[[], None],
) -> Tensor:
    """What may be put in the ``.grad`` of ``parameter``, plain or DTensor."""
    made = CompressedGradient(
        local_of(parameter).detach(),
        name=name,
        add_to_sketch=add_to_sketch,
        drop_sketch=drop_sketch,
    )
    return shaped_like(parameter, made)


def _name_in(args: Any) -> str:
    """The first parameter's among an operator's arguments, which may be lists."""
    if isinstance(args, CompressedGradient):
        return args.parameter_name
    if isinstance(args, (list, tuple)):
        return next(filter(None, map(_name_in, args)), "")
    return ""
