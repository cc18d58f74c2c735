# SPDX-License-Identifier: Apache-2.0
"""DTensors: FSDP2 (``fully_shard``) and HSDP, where a rank holds some rows or some experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

# Private, but what DCP itself places shards with; first offsets suffice since shards are boxes.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flora_dist.comm.groups import MeshReducer
from flora_dist.optim.part import Part
from flora_dist.optim.spec import StateTensor, is_batch, matrix_sizes
from flora_dist.tiles import Cuts, Interval, Tile, find_cuts


@dataclass(frozen=True, slots=True, eq=False)
class DTensorPart:
    """This rank's rows of a parameter, all of their columns."""

    tensor: DTensor
    name: str
    tiles: tuple[Tile, ...]
    matrices: Interval
    reducer: MeshReducer | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def splits_matrices(self) -> bool:
        by_matrix = is_batch(self.shape)
        return any(
            isinstance(p, Shard) and not (by_matrix and p.dim == 0) for p in self.tensor.placements
        )

    def cuts(self, block: int) -> Cuts:
        matrices, rows, columns = matrix_sizes(self.shape)
        return find_cuts((), num_matrices=matrices, num_rows=rows, num_columns=columns, block=block)

    def weight(self) -> Tensor:
        return _local(self.tensor)

    def gradient(self) -> Tensor | None:
        gradient = self.tensor.grad
        if gradient is None:
            return None
        if not isinstance(gradient, DTensor):
            raise TypeError(
                f"the gradient of a DTensor must be a DTensor; that of {self.name!r} is "
                f"{type(gradient).__name__}. Let autograd or DTensor.from_local make it."
            )
        if gradient.placements != self.tensor.placements:
            # Redistributing here would be a collective that a rank without gradient does not join.
            raise ValueError(
                f"a gradient must be placed like its parameter; {self.name!r} has the placements "
                f"{self.tensor.placements}, its gradient {gradient.placements}. Redistribute it "
                "after backward; tensor parallelism is not supported yet."
            )
        return _local(gradient)

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        sizes, _ = compute_local_shape_and_global_offset(
            entry.shape, self.tensor.device_mesh, self._state_placements(entry)
        )
        return tuple(sizes)

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        mesh, placements = self.tensor.device_mesh, self._state_placements(entry)
        local = torch.zeros(self.local_state_shape(entry), dtype=dtype, device=self.tensor.device)
        stride = torch.empty(entry.shape, device="meta").stride()
        # Shape and stride are not derivable from a local tensor where the shards are uneven.
        state = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=torch.Size(entry.shape), stride=stride
        )
        # from_local moves to the mesh's device; with CPU offload the parameter is on the CPU.
        return state if state.device == local.device else state.to(local.device)

    def _state_placements(self, entry: StateTensor) -> tuple[Placement, ...]:
        return tuple(_state_placement(p, entry) for p in self.tensor.placements)

    def local(self, state: Tensor) -> Tensor:
        if not isinstance(state, DTensor):
            raise TypeError(
                f"the state of a DTensor parameter must be DTensors; {self.name!r} has a "
                f"{type(state).__name__}. Load it through torch.distributed.checkpoint."
            )
        return _local(state)


class DTensorLayout:
    """Claims DTensors, and refuses placements that would be computed wrong."""

    def claims(self, tensor: Tensor) -> bool:
        return isinstance(tensor, DTensor)

    def parts(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        assert isinstance(tensor, DTensor)
        for placement in tensor.placements:
            _check_placement(placement, tuple(tensor.shape), name)
        shape = tuple(tensor.shape)
        starts, stops = _box(tensor)
        part = DTensorPart(
            tensor=tensor,
            name=name,
            tiles=_tiles(shape, starts, stops),
            matrices=(starts[0], stops[0]) if is_batch(shape) else (0, 1),
            reducer=_reducer(tensor),
        )
        return (part,)

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        del part
        return state


def _check_placement(placement: Placement, shape: tuple[int, ...], name: str) -> None:
    # Sharded rows stay whole. Experts may be cut by matrix or by row.
    row_dims = (0, 1) if is_batch(shape) else (0,)
    if isinstance(placement, Replicate) or (type(placement) is Shard and placement.dim in row_dims):
        return
    raise ValueError(
        f"a DTensor parameter must be replicated or sharded by rows; {name!r} of shape {shape} has "
        f"the placement {placement}. Shard it on dim 0 (fully_shard's default)."
    )


def _state_placement(placement: Placement, entry: StateTensor) -> Placement:
    """Cut a state tensor as the parameter is cut; column means only by matrices."""
    if not isinstance(placement, Shard) or entry.along != "columns":
        return placement
    by_matrix = len(entry.shape) == 2 and placement.dim == 0
    return placement if by_matrix else Replicate()


def _reducer(tensor: DTensor) -> MeshReducer | None:
    # Replicas hold equal bits already: HSDP's second hop is an all-reduce.
    axes = tuple(axis for axis, p in enumerate(tensor.placements) if p.is_shard())
    return MeshReducer(mesh=tensor.device_mesh, axes=axes) if axes else None


def _box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last + 1 index of this rank's shard in each dim."""
    sizes, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    stops = tuple(start + size for start, size in zip(starts, sizes, strict=True))
    return tuple(starts), stops


def _tiles(
    shape: tuple[int, ...], starts: tuple[int, ...], stops: tuple[int, ...]
) -> tuple[Tile, ...]:
    """A shard as matrices, rows and columns."""
    if starts and any(start == stop for start, stop in zip(starts, stops, strict=True)):
        return ()  # FSDP2 leaves trailing ranks without rows when rows < ranks
    matrices, _, columns = matrix_sizes(shape)
    if is_batch(shape):
        tile = Tile(
            matrices=(starts[0], stops[0]), rows=(starts[1], stops[1]), columns=(0, columns)
        )
    elif len(shape) <= 1:
        tile = Tile(
            matrices=(0, 1), rows=(0, 1), columns=(starts[0], stops[0]) if shape else (0, 1)
        )
    else:
        tile = Tile(matrices=(0, matrices), rows=(starts[0], stops[0]), columns=(0, columns))
    return (tile,)


def _local(tensor: DTensor) -> Tensor:
    with torch.no_grad():  # under grad, to_local returns a view that records autograd
        return tensor.to_local()
