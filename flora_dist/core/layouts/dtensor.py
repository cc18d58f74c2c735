# SPDX-License-Identifier: Apache-2.0
"""DTensors: FSDP2, HSDP and tensor parallelism, where a rank holds a box of a parameter.

Shards by rows or experts keep every row whole. Shards by columns (``RowwiseParallel``,
``Shard(1)``) cut all rows, and blocks where the cut is not a multiple of the block: then a rank
keeps the momentum of each block it touches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

# Private, but what DCP itself places shards with; first offsets suffice since shards are boxes.
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard

from flora_dist.core.comm.groups import MeshReducer
from flora_dist.core.protocols import Part
from flora_dist.core.state.spec import StateTensor, grid_of, is_batch, matrix_sizes
from flora_dist.core.tiles import Cuts, Interval, Tile, find_cuts


@dataclass(frozen=True, slots=True, eq=False)
class DTensorPart:
    """This rank's rows of a parameter, all of their columns."""

    tensor: DTensor
    name: str
    tiles: tuple[Tile, ...]
    matrices: Interval
    reducer: MeshReducer | None
    everyone: tuple[Tile, ...]
    """Tiles of all ranks where columns are sharded; none needed, and none here, elsewhere."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def trains(self) -> bool:
        return self.tensor.requires_grad

    @property
    def splits_matrices(self) -> bool:
        by_matrix = is_batch(self.shape)
        return any(
            isinstance(p, Shard) and not (by_matrix and p.dim == 0) for p in self.tensor.placements
        )

    @property
    def column_shards(self) -> int:
        return math.prod(self.tensor.device_mesh.size(axis) for axis in _column_axes(self.tensor))

    def cuts(self, block: int) -> Cuts:
        return find_cuts(self.everyone, grid_of(self.shape, block))

    def weight(self) -> Tensor:
        return _local(self.tensor)

    def address(self) -> int:
        return self.tensor._local_tensor.data_ptr()

    def gradient(self) -> Tensor | None:
        return None if self.tensor.grad is None else local_gradient(self.tensor, self.name)

    def local_state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        sizes, _ = compute_local_shape_and_global_offset(
            self._state_shape(entry), self.tensor.device_mesh, self._state_placements(entry)
        )
        return tuple(sizes)

    def allocate(self, entry: StateTensor, dtype: torch.dtype) -> Tensor:
        mesh, placements = self.tensor.device_mesh, self._state_placements(entry)
        shape = torch.Size(self._state_shape(entry))
        local = torch.zeros(self.local_state_shape(entry), dtype=dtype, device=self.tensor.device)
        stride = torch.empty(shape, device="meta").stride()
        # Shape and stride are not derivable from a local tensor where the shards are uneven.
        state = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        # from_local moves to the mesh's device; with CPU offload the parameter is on the CPU.
        return state if state.device == local.device else state.to(local.device)

    def _state_shape(self, entry: StateTensor) -> tuple[int, ...]:
        """Of all ranks together: where columns are cut, places for each rank's blocks."""
        if not self.everyone or entry.name != "momentum" or entry.along != "rows":
            return entry.shape
        # Equal for all, so that DTensor cuts them evenly; where cuts stand between blocks, their
        # sum is the number of blocks and the shape is that of the unsharded state.
        places = max(last - first for first, last in map(_blocks(entry.block), self.everyone))
        return (*entry.shape[:-2], places * self.column_shards, entry.shape[-1])

    def _state_placements(self, entry: StateTensor) -> tuple[Placement, ...]:
        """Cut as the parameter is; row means not by columns, column means only by matrices."""
        by_columns = _column_axes(self.tensor)
        placements: list[Placement] = []
        for axis, placement in enumerate(self.tensor.placements):
            by_matrix = is_batch(self.shape) and getattr(placement, "dim", None) == 0
            whole = (entry.along == "columns" and not by_matrix) or (
                entry.name == "row" and axis in by_columns
            )
            placements.append(Replicate() if whole else placement)
        return tuple(placements)

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
        starts, stops = _box(tensor, _coordinate(tensor))
        part = DTensorPart(
            tensor=tensor,
            name=name,
            tiles=_tiles(shape, starts, stops),
            matrices=(starts[0], stops[0]) if is_batch(shape) else (0, 1),
            reducer=_reducer(tensor),
            everyone=_tiles_of_all(tensor),
        )
        return (part,)

    def state_of(self, state: dict[str, Any], part: Part) -> dict[str, Any]:
        del part
        return state


def _check_placement(placement: Placement, shape: tuple[int, ...], name: str) -> None:
    # A folded parameter (convolution) is a box of its matrix only if cut by rows.
    dims = range(len(shape)) if len(shape) <= 2 or is_batch(shape) else (0,)
    if isinstance(placement, Replicate) or (
        _is_shard(placement) and getattr(placement, "dim", -1) in dims
    ):
        return
    raise ValueError(
        f"a DTensor parameter must be replicated, or sharded by rows or columns; {name!r} of shape "
        f"{shape} has the placement {placement}. Shard it on dim 0 (fully_shard's default)."
    )


def _is_shard(placement: Placement) -> bool:
    """Shard, or the strided one of FSDP2 over tensor parallelism, which is no subclass of it."""
    return isinstance(placement, (Shard, _StridedShard))


def _column_axes(tensor: DTensor) -> tuple[int, ...]:
    """Axes of the mesh that cut columns."""
    last = tensor.ndim - 1
    if last < 1:
        return ()
    return tuple(
        axis
        for axis, placement in enumerate(tensor.placements)
        if _is_shard(placement) and getattr(placement, "dim", None) == last
    )


def _blocks(block: int) -> Callable[[Tile], Interval]:
    return lambda tile: tile.blocks(block)


def _reducer(tensor: DTensor) -> MeshReducer | None:
    # Replicas hold equal bits already: HSDP's second hop is an all-reduce.
    axes = shard_axes(tensor)
    return MeshReducer(mesh=tensor.device_mesh, axes=axes) if axes else None


def _coordinate(tensor: DTensor) -> Sequence[int]:
    """This rank's place on the mesh."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this process is outside the mesh of its own parameter"
    return coordinate


def _box(tensor: DTensor, coordinate: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last + 1 index, in each dim, of the shard at a place of the mesh."""
    sizes, starts = _compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh.shape, list(coordinate), tensor.placements
    )
    stops = tuple(start + size for start, size in zip(starts, sizes, strict=True))
    return tuple(starts), stops


def _tiles_of_all(tensor: DTensor) -> tuple[Tile, ...]:
    """Tiles of all ranks if columns are cut, else none: whole rows need no others."""
    if not _column_axes(tensor):
        return ()
    places = itertools.product(*map(range, tensor.device_mesh.shape))
    shape = tuple(tensor.shape)
    return tuple({tile for place in places for tile in _tiles(shape, *_box(tensor, place))})


def _tiles(
    shape: tuple[int, ...], starts: tuple[int, ...], stops: tuple[int, ...]
) -> tuple[Tile, ...]:
    """A shard as matrices, rows and columns."""
    if starts and any(start == stop for start, stop in zip(starts, stops, strict=True)):
        return ()  # FSDP2 leaves trailing ranks without rows when rows < ranks
    matrices, _, columns = matrix_sizes(shape)
    if is_batch(shape):
        tile = Tile(
            matrices=(starts[0], stops[0]),
            rows=(starts[1], stops[1]),
            columns=(starts[2], stops[2]),
        )
    elif len(shape) == 2:
        tile = Tile(matrices=(0, 1), rows=(starts[0], stops[0]), columns=(starts[1], stops[1]))
    elif len(shape) <= 1:
        tile = Tile(
            matrices=(0, 1), rows=(0, 1), columns=(starts[0], stops[0]) if shape else (0, 1)
        )
    else:
        tile = Tile(matrices=(0, matrices), rows=(starts[0], stops[0]), columns=(0, columns))
    return (tile,)


def _local(tensor: DTensor) -> Tensor:
    # What to_local() gives where no autograd is recorded. That asks whether it is, and every step
    # asks for the tensors of every parameter: 2 us in place of 10.
    return tensor._local_tensor


def local_gradient(tensor: DTensor, name: str) -> Tensor:
    """The plain tensor of this rank in ``tensor.grad``, which is there.

    Raises:
        TypeError: it is no DTensor.
        ValueError: it is placed unlike its parameter.
    """
    gradient = tensor.grad
    if not isinstance(gradient, DTensor) or gradient.layout != torch.strided:
        kind = gradient.layout if isinstance(gradient, DTensor) else type(gradient).__name__
        raise TypeError(
            f"the gradient of a DTensor must be a dense DTensor; that of {name!r} is {kind}. Let "
            "autograd or DTensor.from_local make it."
        )
    if gradient.placements != tensor.placements:
        # Redistributing here would be a collective that a rank without gradient does not join.
        raise ValueError(
            f"a gradient must be placed like its parameter; {name!r} has the placements "
            f"{tensor.placements}, its gradient {gradient.placements}. After backward, on every "
            "rank: p.grad = p.grad.redistribute(placements=p.placements)."
        )
    return _local(gradient)


def local_of(tensor: Tensor) -> Tensor:
    """The plain tensor of this rank inside a DTensor; a plain tensor itself."""
    return _local(tensor) if isinstance(tensor, DTensor) else tensor


def offsets_of(tensor: Tensor) -> tuple[int, ...]:
    """Index of the first element that this rank holds, in each dim."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return _box(tensor, _coordinate(tensor))[0]


def shaped_like(tensor: Tensor, local: Tensor) -> Tensor:
    """``local`` as this rank's part of a DTensor placed like ``tensor``, if that is one."""
    if not isinstance(tensor, DTensor):
        return local
    # Not from_local: it looks at the tensor, and a gradient's stand-in has nothing to look at.
    return DTensor(local, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def tiles_at(tensor: DTensor) -> tuple[Tile, ...]:
    """What of a parameter this rank holds."""
    return _tiles(tuple(tensor.shape), *_box(tensor, _coordinate(tensor)))


class TilesAlong(Sequence[tuple[Tile, ...]]):
    """What each rank along an axis of the mesh holds, this one's place on the others.

    Found when it is asked for: a thousand ranks have a thousand tiles of each parameter.
    """

    def __init__(self, tensor: DTensor, axis: int) -> None:
        self._tensor, self._axis = tensor, axis
        self._starts, self._stops = _box(tensor, _coordinate(tensor))
        cutting = tensor.placements[axis]
        others: list[Any] = [
            placement
            for at, placement in enumerate(tensor.placements)
            if at != axis and _is_shard(placement)
        ]
        dim = cutting.dim if isinstance(cutting, Shard) else None
        self._dim = None if any(each.dim == dim for each in others) else dim
        """What the axis alone cuts, as torch.chunk does: then DTensor need not be asked."""

    def __len__(self) -> int:
        return self._tensor.device_mesh.size(self._axis)

    def __getitem__(self, place: Any) -> Any:
        """The tiles of one place: one, or none."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        shape, dim = tuple(self._tensor.shape), self._dim
        if dim is None:
            coordinate = [*_coordinate(self._tensor)]
            coordinate[self._axis] = place
            return _tiles(shape, *_box(self._tensor, coordinate))
        size = -(-shape[dim] // len(self))
        start = min(shape[dim], place * size)
        stop = min(shape[dim], start + size)
        starts = (*self._starts[:dim], start, *self._starts[dim + 1 :])
        return _tiles(shape, starts, (*self._stops[:dim], stop, *self._stops[dim + 1 :]))


def shard_axes(tensor: DTensor) -> tuple[int, ...]:
    """Axes of the mesh that cut the parameter."""
    return tuple(axis for axis, p in enumerate(tensor.placements) if _is_shard(p))
