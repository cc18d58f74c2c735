# SPDX-License-Identifier: Apache-2.0
"""Call every function of torch on a gradient's stand-in, and print what became of it.

`python -m tests.gradients.every_function`. A process of its own: before functions were refused by
name some of them ended it. The table is torch's own, of what a Tensor subclass may override, with
arguments guessed from their types as in torch's own test of it.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import get_testing_overrides, resolve_name
from torch.testing._internal.generated.annotated_fn_args import annotated_args

from flora_dist.gradients.placeholder import CompressedGradient, stand_in_for

GUESSES: dict[str, Any] = {
    "Scalar": 3.5,
    "bool": False,
    "Dimname": "",
    "DimnameList": [""],
    "ScalarType": torch.float32,
    "SymInt": 1,
    "Generator": None,
    "MemoryFormat": None,
    "TensorOptions": None,
    "Stream": None,
}


def started() -> Tensor:
    """A stand-in that nobody has touched."""
    dense = torch.ones(24, 24)
    return stand_in_for(dense, name="weight", add_to_sketch=_nothing, drop_sketch=lambda: None)


def _nothing(addend: Tensor) -> None:
    del addend


def functions() -> Iterator[tuple[str, Callable[..., Any], Callable[[Tensor, Tensor], list[Any]]]]:
    """Name, function, and its arguments from a stand-in and from what is beside it."""
    overrides = get_testing_overrides()
    for function, dummy in overrides.items():
        yield resolve_name(function) or str(function), function, arguments_of(function, dummy)
    for name, function in BY_HAND.items():
        yield name, function, lambda one, _: [one]
    known = {resolve_name(function) for function in overrides}
    for name in dir(Tensor):
        if f"torch.Tensor.{name}" not in known and not hasattr(object, name):
            yield f"torch.Tensor.{name}", by_name(name), lambda one, _: [one]


BY_HAND: dict[str, Callable[[Any], Any]] = {
    "share_memory of its model": lambda gradient: _model_with(gradient).share_memory(),
    "a move of its model": lambda gradient: _model_with(gradient).to(torch.float64),
    "a pickle": pickle.dumps,
    "a copy": copy.copy,
    "a deep copy": copy.deepcopy,
    "numpy.asarray": numpy.asarray,
    "float": float,
    "an index": lambda gradient: gradient[0, 0],
    "writing at an index": lambda gradient: gradient.__setitem__(0, 1.0),
    "deleting at an index": lambda gradient: gradient.__delitem__(0),
    "another type": lambda gradient: gradient.as_subclass(Tensor),
    "another view of its memory": lambda gradient: torch.Tensor._make_subclass(Tensor, gradient),
    "torch.tensor": torch.tensor,
    "torch.as_tensor": lambda gradient: torch.as_tensor(gradient, dtype=torch.float64),
    "new_zeros": lambda gradient: gradient.new_zeros(3),
    "new data": lambda gradient: setattr(gradient, "data", torch.ones(24, 24)),
    "an addition to another": lambda gradient: torch.ones(24, 24).add_(gradient),
    "an addition of itself": lambda gradient: gradient.add_(gradient),
    "an output": lambda gradient: torch.add(torch.ones(24, 24), 1, out=gradient),
    "a list": lambda gradient: torch._foreach_add_([torch.ones(24, 24), gradient], 1.0),
}
"""What torch's table leaves out, or reaches in another way."""


def _model_with(gradient: Tensor) -> nn.Module:
    model = nn.Linear(24, 24, bias=False)
    model.weight.grad = gradient
    return model


def by_name(name: str) -> Callable[[Any], Any]:
    """Reads an attribute, and calls it if it is a method."""

    def read(tensor: Any) -> Any:
        found = getattr(tensor, name)
        return found() if inspect.ismethod(found) or inspect.isbuiltin(found) else found

    return read


def arguments_of(function: Any, dummy: Any) -> Callable[[Tensor, Tensor], list[Any]]:
    """The stand-in in the first place for a tensor, something else in the others."""
    if function in annotated_args:
        kinds = [
            (argument["simple_type"], int(argument.get("size", 2)))
            for argument in annotated_args[function]
            if argument["is_kwarg_only"] != "True"
        ]
        return lambda one, other: _guessed(kinds, one, other)
    spec = inspect.getfullargspec(dummy)
    needed = max(1, len(spec.args) - len(spec.defaults or ()))
    return lambda one, other: [one, *[other] * (needed - 1)]


def _guessed(kinds: list[tuple[str, int]], one: Tensor, other: Tensor) -> list[Any]:
    found: list[Any] = []
    tensors = itertools.chain([one], itertools.repeat(other))
    for kind, size in kinds:
        if "Tensor" in kind and "TensorOptions" not in kind:
            tensor = next(tensors)
            found.append([tensor, tensor] if "List" in kind else tensor)
        elif "IntArrayRef" in kind:
            found.append(1 if size == 1 else [1] * size)
        elif kind in GUESSES:
            found.append(GUESSES[kind])
        elif "string_view" in kind:
            found.append("")
        else:
            found.append(0 if kind.startswith("int") else 1.0)
    return found


def outcome(function: Callable[..., Any], arguments: list[Any]) -> str:
    """What a call comes to: "refused" by us, an error by its kind, or the result itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(*arguments)
    except Exception as error:
        is_ours = isinstance(error, RuntimeError) and "kept as sketches" in str(error)
        return "refused" if is_ours else f"raised {type(error).__name__}"
    if isinstance(result, CompressedGradient):
        return "the stand-in"
    return "a tensor" if isinstance(result, Tensor) else repr(result)


def verdict(function: Callable[..., Any], arguments: Any, gradient: Tensor) -> str:
    """ "refused", "as dense" (the same answer, or an error at the arguments), or what it is."""
    got = outcome(function, arguments(gradient, torch.ones(24, 24)))
    if got in {"refused", "the stand-in"}:
        return got
    dense = outcome(function, arguments(torch.ones(24, 24), torch.ones(24, 24)))
    return "as dense" if got == dense else f"{got}, dense {dense}"


def main() -> None:
    """Two lines per function: its name before the call, the verdict after it."""
    torch.manual_seed(0)
    for name, function, arguments in functions():
        gradient = started()
        print(json.dumps(["called", name]), flush=True)
        print(json.dumps(["came to", verdict(function, arguments, gradient)]), flush=True)


if __name__ == "__main__":
    main()
