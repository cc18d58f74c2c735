# SPDX-License-Identifier: Apache-2.0
"""Parameters of many shapes, their gradients, and what a run leaves behind."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora

Parameters = dict[str, nn.Parameter]

# With rank 2 of blocks of 8: ragged, whole blocks, experts, folded, narrow (dense), 1-D, 0-D.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (5, 20),
    "whole": (16, 16),
    "experts": (3, 4, 13),
    "conv": (6, 2, 3, 2),
    "narrow": (9, 3),
    "bias": (7,),
    "scale": (),
}
# clip active, and windows that change; a rule that goes with every sketch and transfer; a momentum
# whose every digit can be compared
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "rank": 2,
    "block": 8,
    "momentum": "flora",
    "kappa": 3,
    "clip": 0.3,
    "state_dtype": "float32",
}


def draw(name: str, step: int, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Normal numbers that hang on name and step, anisotropic in the last dimension."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if values.ndim:
        values *= torch.linspace(0.1, 3.0, values.shape[-1], dtype=torch.float64)
    return values.to(dtype)


def build(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64
) -> Parameters:
    """Parameters at their start values, which are never zero."""
    return {
        name: nn.Parameter(0.5 * draw(name, -1, shape, dtype)) for name, shape in shapes.items()
    }


class Module(nn.Module):
    """A module of these parameters, for what asks for one."""

    def __init__(self) -> None:
        super().__init__()
        for name, parameter in build().items():
            self.register_parameter(name, parameter)


def set_gradients(parameters: Parameters, step: int, without: Collection[str] = ()) -> None:
    """Each parameter's gradient of a step; None for those ``without``."""
    for name, parameter in parameters.items():
        parameter.grad = None
        if name not in without:
            drawn = draw(name, step, parameter.shape, parameter.dtype)
            parameter.grad = drawn.to(parameter.device)


def train(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    steps: Iterable[int],
    without: Collection[str] = (),
) -> None:
    """Take steps with the gradients of these numbers."""
    for step in steps:
        set_gradients(parameters, step, without)
        optimizer.step()


def pair(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Parameters, Flora]:
    """Parameters of all shapes and their optimizer, with names."""
    parameters = build(dtype=dtype)
    return parameters, Flora(parameters.items(), **{**SETTINGS, **settings})


def trained(
    steps: int = 4, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Parameters, Flora]:
    """The same after so many steps."""
    parameters, optimizer = pair(dtype, **settings)
    train(optimizer, parameters, range(steps))
    return parameters, optimizer


def values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the weights."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def run(steps: Iterable[int], **settings: Any) -> dict[str, Tensor]:
    """Weights of a run of all shapes in float64, with names."""
    parameters, optimizer = pair(**settings)
    train(optimizer, parameters, steps)
    return values(parameters)


@functools.cache
def expected_run(steps: range, **settings: Any) -> dict[str, Tensor]:
    """``run``, once per session: not under a monkeypatch, and not to be written to."""
    return run(steps, **settings)


def everything(optimizer: torch.optim.Optimizer) -> Any:
    """A copy of all that an optimizer can change: groups, state and weights."""
    groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
    weights = [tensor.detach().clone() for group in groups for tensor in group["params"]]
    for group in groups:
        group["params"] = [id(tensor) for tensor in group["params"]]
    state = {id(tensor): copy.deepcopy(dict(kept)) for tensor, kept in optimizer.state.items()}
    return {"groups": groups, "state": state, "weights": weights}


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    """Equal bit for bit: structure, types, dtypes and values (NaN equals NaN)."""
    assert type(left) is type(right), (where, type(left), type(right))
    if isinstance(left, Mapping):
        assert list(left) == list(right), (where, list(left), list(right))
        for key in left:
            assert_equal(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{where}/{index}")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, (where, left.dtype, right.dtype)
        assert left.shape == right.shape, (where, left.shape, right.shape)
        equal = (left == right) | ((left != left) & (right != right))
        assert bool(equal.all()), where
    else:
        assert left == right or (left != left and right != right), (where, left, right)


def assert_refused(
    words: Iterable[str], action: Callable[[], Any], kind: type[Exception] = ValueError
) -> None:
    """The action raises an error that holds all these words: subject, rule, value, remedy."""
    with pytest.raises(kind, match=r"\w") as raised:
        action()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, (missing, str(raised.value))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    return sum(
        value.numel() * value.element_size()
        for kept in optimizer.state.values()
        for value in kept.values()
        if isinstance(value, Tensor)
    )
