# SPDX-License-Identifier: Apache-2.0
"""Plain tensors: one process, or DDP, where every rank holds everything and equal gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.protocols import Part
from flora_dist.core.state.spec import StateTensor, grid_of, matrix_sizes
from flora_dist.core.tiles import Cuts, Interval, Tile, find_cuts


@dataclass(frozen=True, slots=True, eq=False)
class ReplicatedPart:
    """A whole parameter."""

    tensor: Tensor
    name: str
    model: Tensor
    """The model's own parameter: ``tensor``, or what an engine keeps a copy of."""

    @property
    def trains(self) -> bool:
        return self.model.requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        return whole(self.shape)

    @property
    def matrices(self) -> Interval:
        return 0, matrix_sizes(self.shape)[0]

    @property
    def splits_matrices(self) -> bool:
        return False

    @property
    def column_shards(self) -> int:
        return 1

    @property
    def reducer(self) -> None:
        return None

    def cuts(self, block: int) -> Cuts:
        return find_cuts((), grid_of(self.shape, block))

    def weight(self) -> Tensor:
        return self.tensor.detach()

    def address(self) -> int:
        return self.tensor.data_ptr()

    def gradient(self) -> Tensor | None:
        gradient = self.tensor.grad
        if gradient is not None and gradient.layout is not torch.strided:
            raise ValueError(
                f"gradients must be dense; that of {self.name!r} is {gradient.layout}. Build the "
                "module with sparse=False."
            )
        return gradient

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        return entry.shape

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(entry.shape, dtype=dtype, device=self.tensor.device)

    def local(self, state: Tensor) -> Tensor:
        return state


class ReplicatedLayout:
    """Claims every plain tensor."""

    def claims(self, tensor: Tensor) -> bool:
        return type(tensor) in {Tensor, torch.nn.Parameter}

    def parts(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        return (ReplicatedPart(tensor, name, tensor),)

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        del part
        return state


class NamedLayout:
    """Whole plain tensors that an engine put in place of parameters, by the names of those."""

    def __init__(self, named: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        """``named``: name, tensor, and the model's parameter, which may be the same."""
        self._parts = {id(t): ReplicatedPart(t, name, model) for name, t, model in named}

    def claims(self, tensor: Tensor) -> bool:
        return id(tensor) in self._parts

    def parts(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        del name
        return (self._parts[id(tensor)],)

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        del part
        return state


def whole(shape: tuple[int, ...]) -> tuple[Tile, ...]:
    """One tile of everything; none of an empty parameter."""
    matrices, rows, columns = matrix_sizes(shape)
    if matrices * rows * columns == 0:
        return ()
    return (Tile(matrices=(0, matrices), rows=(0, rows), columns=(0, columns)),)
