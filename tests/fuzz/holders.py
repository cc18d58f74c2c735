# SPDX-License-Identifier: Apache-2.0
"""How a process holds a case's parameters: whole, as boxes of DTensors, or as spans of a line."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from flora_dist import Flora
from tests.battery.flat import layout_of
from tests.fuzz.cases import WORLD_SIZE, Case, Parameter


class Holder(Protocol):
    """Parameters as the optimizer sees them."""

    def tensors(self, group: int) -> list[Any]:
        """What the optimizer is given for a group."""

    def attach(self, optimizer: Flora) -> None:
        """Tell it how they are held."""

    def give(self, name: str, gradient: Tensor | None, missing: tuple[int, ...]) -> None:
        """Set a parameter's gradient, None on some ranks."""

    def stepped(self, name: str) -> nn.Parameter:
        """The tensor of the optimizer that holds a parameter."""

    def without(self, name: str, gradient: Tensor, missing: tuple[int, ...]) -> Tensor:
        """The whole gradient that all ranks together have then."""

    def local(self, name: str) -> Tensor:
        """What is here of a weight, sharing its memory."""

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """The same part of another whole tensor."""

    def state(self, optimizer: Flora, name: str) -> Mapping[str, Any]:
        """The parameter's state."""


class Whole:
    """One process."""

    def __init__(self, case: Case, start: Mapping[str, Tensor]) -> None:
        self.case = case
        self.parameters = {p.name: _plain(p, start[p.name]) for p in case.parameters}

    def tensors(self, group: int) -> list[Any]:
        return _entries(self.case, self.parameters, group)

    def attach(self, optimizer: Flora) -> None:
        """Plain tensors speak for themselves."""

    def give(self, name: str, gradient: Tensor | None, missing: tuple[int, ...]) -> None:
        parameter = self.parameters[name]
        parameter.grad = None
        if gradient is not None and not missing:
            # As its parameter lies: autograd does so, and strides must not matter.
            parameter.grad = torch.empty_like(parameter.detach()).copy_(gradient)

    def stepped(self, name: str) -> nn.Parameter:
        return self.parameters[name]

    def without(self, name: str, gradient: Tensor, missing: tuple[int, ...]) -> Tensor:
        raise AssertionError(f"one process has a gradient or not: {name}, {missing}, {gradient}")

    def local(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    def mine(self, name: str, whole: Tensor) -> Tensor:
        del name
        return whole

    def state(self, optimizer: Flora, name: str) -> Mapping[str, Any]:
        return optimizer.state.get(self.parameters[name], {})

    def copied(self, how: str, optimizer: Flora) -> Flora:
        """Replace the parameters and their optimizer by a copy of both."""
        both = (self.parameters, optimizer)
        # Our own bytes, read back in the same process.
        made = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        self.parameters, twin = made
        return twin


class Boxes:
    """DTensors: fully_shard's rows, or columns."""

    def __init__(self, case: Case, start: Mapping[str, Tensor]) -> None:
        self.case = case
        self.mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        self.placements: dict[str, Placement] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        if case.layout == "fsdp2":
            self._shard_fully(start)
        else:
            self._shard_columns(start)

    def _shard_fully(self, start: Mapping[str, Tensor]) -> None:
        model = nn.Module()
        for name, weight in start.items():
            model.register_parameter(name, nn.Parameter(weight.clone()))
        fully_shard(model, mesh=self.mesh)
        self.parameters = dict(model.named_parameters())
        self.placements = {name: Shard(0) for name in start}

    def _shard_columns(self, start: Mapping[str, Tensor]) -> None:
        for name, weight in start.items():
            folds = weight.ndim > 3 or (weight.ndim == 3 and weight.shape[2] < 8)
            dim = 0 if folds else weight.ndim - 1
            self.placements[name] = Shard(dim) if weight.ndim else Replicate()
            self.parameters[name] = nn.Parameter(self._place(name, weight.clone()))

    def _place(self, name: str, whole: Tensor) -> DTensor:
        # Every rank has the whole: nothing need be sent.
        return distribute_tensor(whole, self.mesh, [self.placements[name]], src_data_rank=None)

    def tensors(self, group: int) -> list[Any]:
        return _entries(self.case, self.parameters, group)

    def attach(self, optimizer: Flora) -> None:
        """DTensors speak for themselves."""

    def give(self, name: str, gradient: Tensor | None, missing: tuple[int, ...]) -> None:
        is_here = gradient is not None and dist.get_rank() not in missing
        self.parameters[name].grad = self._place(name, gradient.clone()) if is_here else None

    def stepped(self, name: str) -> nn.Parameter:
        return self.parameters[name]

    def without(self, name: str, gradient: Tensor, missing: tuple[int, ...]) -> Tensor:
        gradient, placement = gradient.clone(), self.placements[name]
        if isinstance(placement, Shard):
            pieces = gradient.chunk(WORLD_SIZE, placement.dim)
            for rank in missing:
                if rank < len(pieces):
                    pieces[rank].zero_()
        return gradient

    def local(self, name: str) -> Tensor:
        tensor = self.parameters[name].detach()
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def mine(self, name: str, whole: Tensor) -> Tensor:
        return self._place(name, whole.clone()).to_local()

    def state(self, optimizer: Flora, name: str) -> Mapping[str, Any]:
        return optimizer.state.get(self.parameters[name], {})


class Lines:
    """One flat tensor for each group, cut anywhere: in rows, in blocks, or before everything."""

    def __init__(self, case: Case, start: Mapping[str, Tensor]) -> None:
        self.case, self.rank = case, dist.get_rank()
        self.shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in case.groups]
        self.places: dict[str, tuple[int, int, int]] = {}
        self.bounds: list[list[int]] = []
        self.flats: list[nn.Parameter] = []
        dealer = random.Random(case.label)
        for parameter in case.parameters:
            sizes = [torch.Size(s).numel() for s in self.shapes[parameter.group].values()]
            first, size = sum(sizes), torch.Size(parameter.shape).numel()
            self.places[parameter.name] = (parameter.group, first, first + size)
            self.shapes[parameter.group][parameter.name] = parameter.shape
        for shapes in self.shapes:
            line = torch.cat([start[name].flatten() for name in shapes])
            self.bounds.append([0, dealer.randint(0, line.numel()), line.numel()])
            first, stop = self.bounds[-1][self.rank : self.rank + 2]
            self.flats.append(nn.Parameter(line[first:stop].clone()))

    def tensors(self, group: int) -> list[Any]:
        return [self.flats[group]]

    def attach(self, optimizer: Flora) -> None:
        for flat, shapes, bounds in zip(self.flats, self.shapes, self.bounds, strict=True):
            optimizer.attach_layout(layout_of(flat, shapes, bounds))

    def give(self, name: str, gradient: Tensor | None, missing: tuple[int, ...]) -> None:
        flat = self.flats[self.places[name][0]]
        if gradient is None or self.rank in missing:
            flat.grad = None
            return
        if flat.grad is None:
            flat.grad = torch.zeros_like(flat)
        place, (start, stop) = self._own(name)
        flat.grad[place].copy_(gradient.flatten()[start:stop])

    def stepped(self, name: str) -> nn.Parameter:
        return self.flats[self.places[name][0]]

    def without(self, name: str, gradient: Tensor, missing: tuple[int, ...]) -> Tensor:
        gradient = gradient.clone()
        for rank in missing:
            gradient.view(-1)[slice(*self._span(name, rank))].zero_()
        return gradient

    def _span(self, name: str, rank: int) -> tuple[int, int]:
        """Elements of the parameter that a rank owns."""
        group, first, stop = self.places[name]
        inside = [min(max(bound, first), stop) - first for bound in self.bounds[group]]
        return list(itertools.pairwise(inside))[rank]

    def _own(self, name: str) -> tuple[slice, tuple[int, int]]:
        """Where this rank's elements of a parameter stand in its flat tensor, and which."""
        group, first, _ = self.places[name]
        start, stop = self._span(name, self.rank)
        offset = max(0, first - self.bounds[group][self.rank])
        return slice(offset, offset + stop - start), (start, stop)

    def local(self, name: str) -> Tensor:
        return self.flats[self.places[name][0]].detach()[self._own(name)[0]]

    def mine(self, name: str, whole: Tensor) -> Tensor:
        return whole.flatten()[slice(*self._own(name)[1])]

    def state(self, optimizer: Flora, name: str) -> Mapping[str, Any]:
        own: Mapping[str, Any] = optimizer.state.get(self.flats[self.places[name][0]], {})
        return own.get(name, {})


def saved(optimizer: Flora, how: str) -> dict[str, Any]:
    """The optimizer's state dict, by way of a file or not."""
    if how == "state_dict":
        return optimizer.state_dict()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def holder_of(case: Case, start: Mapping[str, Tensor]) -> Holder:
    """Parameters at their start values."""
    return {"whole": Whole, "flat": Lines}.get(case.layout, Boxes)(case, start)


def _plain(parameter: Parameter, start: Tensor) -> nn.Parameter:
    weight = start.clone()
    return nn.Parameter(weight.t().contiguous().t() if parameter.is_transposed else weight)


def _entries(case: Case, parameters: Mapping[str, nn.Parameter], group: int) -> list[Any]:
    names = [p.name for p in case.parameters if p.group == group]
    return [(name, parameters[name]) if case.is_named else parameters[name] for name in names]
