# SPDX-License-Identifier: Apache-2.0
"""What stands in ``.grad`` of a parameter whose gradient is kept as sketches.

Nothing of it is there to read, so whoever asks for a norm, a scale or elements is refused: torch's
own clipping would else take the norm of the other parameters alone, without a word. Adding works,
and so do questions about shape and kind; every other function of torch is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import resolve_name

from flora_dist.core.layouts.dtensor import local_of, shaped_like

_aten: Any = torch.ops.aten
_ADDS = {_aten.add_.Tensor, _aten.add_.Scalar}
_SUBTRACTS = {_aten.sub_.Tensor, _aten.sub_.Scalar}


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
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuse what is not known here: some go past dispatch, to memory that is not there."""
        del types
        kwargs = kwargs or {}
        is_dispatched = isinstance(func, torch._ops.OpOverload)
        if func in _PASSED or is_dispatched or _describes(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise _refusal(func, (args, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Adding, autograd's own ``grad += new`` too, ``zero_()`` and ``detach()``."""
        del types
        kwargs = kwargs or {}
        gradient = args[0] if args else None
        if not isinstance(gradient, CompressedGradient) or _name_in((args[1:], kwargs)):
            raise _refusal(func, (args, kwargs))
        if func in _ADDS or func in _SUBTRACTS:
            gradient.add_to_sketch(_addend(func, *args, **kwargs))
            return gradient
        if func is _aten.zero_.default:
            gradient.drop_sketch()
            return gradient
        if func is _aten.detach.default:
            return _another(gradient)
        raise _refusal(func, (args, kwargs))


def stands_in(gradient: Tensor | None) -> bool:
    """Whether ``.grad`` stands for sketches."""
    if isinstance(gradient, DTensor):
        gradient = local_of(gradient)
    return isinstance(gradient, CompressedGradient)


def stand_in_for(
    parameter: Tensor,
    *,
    name: str,
    add_to_sketch: Callable[[Tensor], None],
    drop_sketch: Callable[[], None],
) -> Tensor:
    """What may be put in the ``.grad`` of ``parameter``, plain or DTensor."""
    is_sharded = isinstance(parameter, DTensor)
    made = CompressedGradient(
        (local_of(parameter) if is_sharded else parameter).detach(),
        name=name,
        add_to_sketch=add_to_sketch,
        drop_sketch=drop_sketch,
    )
    return shaped_like(parameter, made) if is_sharded else made


def _another(gradient: CompressedGradient) -> CompressedGradient:
    """For the same sketches."""
    return CompressedGradient(
        gradient,
        name=gradient.parameter_name,
        add_to_sketch=gradient.add_to_sketch,
        drop_sketch=gradient.drop_sketch,
    )


def _addend(func: Any, gradient: Tensor, other: Any, alpha: Any = 1) -> Tensor:
    """What an addition adds, a number or a tensor, in the shape of the gradient.

    Raises:
        RuntimeError: torch's own, of dtypes that do not fit and shapes that do not broadcast.
    """
    is_number = not isinstance(other, Tensor)
    if is_number or other.dtype != gradient.dtype or alpha != 1:
        like = torch.zeros(1, dtype=gradient.dtype)
        func(like, other if is_number else torch.zeros(1, dtype=other.dtype), alpha=alpha)
    if is_number:
        other = torch.tensor(other, dtype=gradient.dtype)
    found: Tensor = other if other.layout == torch.strided else other.to_dense()
    dtype = torch.promote_types(found.dtype, gradient.dtype)
    found = found.to(device=gradient.device, dtype=dtype)
    factor = -alpha if func in _SUBTRACTS else alpha
    return (found if factor == 1 else found * factor).expand(gradient.shape)


# ---- what is refused, and what is not

_KNOWN: dict[Any, tuple[str, ...]] = {
    # What adding does with elements, dispatch decides; the others are right without any.
    Tensor: (
        *("add_", "__iadd__", "sub_", "__isub__", "subtract_", "zero_", "detach", "detach_"),
        *("size", "stride", "dim", "numel", "nelement", "ndimension", "element_size", "get_device"),
        *("is_contiguous", "is_same_size", "is_floating_point", "is_complex", "is_signed"),
        *("is_inference", "is_conj", "is_neg", "requires_grad_", "_is_view", "storage_offset"),
        *("__len__", "__dir__", "__format__", "__hash__"),
    ),
    torch: (
        *("numel", "is_floating_point", "is_complex", "is_signed"),
        *("is_inference", "is_conj", "is_neg"),
    ),
}
_ATTRIBUTES = (
    *("data", "requires_grad", "grad", "grad_fn", "is_leaf", "_version"),
    *("shape", "ndim", "dtype", "layout", "device", "itemsize", "is_cpu", "is_cuda", "is_xpu"),
    *("is_mps", "is_meta", "is_mkldnn", "is_quantized", "is_sparse", "is_sparse_csr"),
    "is_nested",
)
_PASSED: frozenset[Any] = frozenset(
    [
        *(getattr(home, name) for home, names in _KNOWN.items() for name in names),
        *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
        # As zero_grad() sets it.
        getattr(Tensor, "requires_grad").__set__,  # noqa: B009 - typed as the bool it holds
    ]
)


def _describes(func: Any) -> bool:
    """Whether torch.compile asks for a storage to tell tensors apart; it reads none."""
    return func is Tensor.untyped_storage and torch._guards.CompileContext.try_get() is not None


def _refusal(func: Any, arguments: Any) -> RuntimeError:
    return RuntimeError(
        f"the gradient of {_name_in(arguments)!r} is kept as sketches and has no elements for "
        f"{resolve_name(func) or func}. For its norm call optimizer.grad_norm(), to clip "
        "optimizer.clip_grad_norm_(max_norm), in place of torch's. A host clips so itself where it "
        "attaches: accelerator.clip_grad_norm_ by flora_dist.accelerate.attach, Lightning's "
        "gradient_clip_val by flora_dist.lightning.SketchedGradients; the Hugging Face Trainer, "
        "which asks for a norm whatever max_grad_norm is, by flora_dist.transformers.FloraTrainer. "
        "torchtitan's training.max_norm has no such way. To add to it p.grad.add_(x, alpha=a), to "
        "scale it scale the loss; to move, copy or share the model call zero_grad() first; in "
        "place of GradScaler use bf16; or keep gradients dense: do not call attach()."
    )


def _name_in(arguments: Any) -> str:
    """The first parameter's among a function's arguments, which may be nested."""
    if isinstance(arguments, CompressedGradient):
        return arguments.parameter_name
    if isinstance(arguments, dict):
        return _name_in(list(arguments.values()))
    if isinstance(arguments, (list, tuple)):
        return next(filter(None, map(_name_in, arguments)), "")
    return ""


def is_shown(visible: Tensor | None) -> bool:
    """Whether a parameter's ``.grad`` stands for sketches; None: a parameter that shows nothing."""
    return visible is not None and stands_in(visible.grad)


def hide(visible: Tensor | None) -> None:
    """As ``zero_grad()`` leaves a parameter; sketches are dropped when that is noticed."""
    assert visible is not None, "only what is shown can be hidden"
    visible.grad = None
