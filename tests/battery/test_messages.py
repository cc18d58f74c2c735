# SPDX-License-Identifier: Apache-2.0
"""What travels, who decides, and what each rank keeps when meshes and shards get unusual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from flora_dist import Flora
from flora_dist.core.comm import groups
from tests.battery.oracle import Case, distances, reference_of
from tests.conftest import pool_of

CASE = Case(settings={"momentum": "flora"})
STEPS = 5


def _values(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _parameter(shape: tuple[int, ...], mesh: Any, placements: list[Placement]) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(_values(shape, 0), mesh, placements))


def _set_gradient(parameter: nn.Parameter, step: int) -> None:
    tensor = parameter.data
    assert isinstance(tensor, DTensor)
    whole = _values(tuple(tensor.shape), 1 + step)
    parameter.grad = distribute_tensor(whole, tensor.device_mesh, tensor.placements)


def _two_meshes() -> list[tuple[int, Tensor]]:
    """A NaN in what only ranks 0 and 2 share with each other; steps counted and weights kept."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    parameters = {
        "a": _parameter((6, 16), mesh["x"], [Shard(0)]),
        "b": _parameter((6, 16), mesh["y"], [Shard(0)]),
    }
    optimizer = Flora(parameters.items(), **CASE.flora, skip_nonfinite=True)
    for step in range(3):
        for parameter in parameters.values():
            _set_gradient(parameter, step)
        gradient = parameters["a"].grad
        assert isinstance(gradient, DTensor)
        if step == 1 and dist.get_rank() == 0:
            gradient.to_local()[0, 0] = float("nan")
        optimizer.step()
    state = [(optimizer.state[p]["step"], p.detach()) for p in parameters.values()]
    return [(step, weight.full_tensor()) for step, weight in state]


def test_a_nan_on_one_mesh_skips_the_step_on_every_rank_of_every_mesh() -> None:
    # Incident: ranks that did not see the NaN stepped on, and the replicas diverged for good.
    everyone = pool_of(4)(_two_meshes)
    for state in everyone:
        assert [step for step, _ in state] == [2, 2]
        assert all(weight.isfinite().all() for _, weight in state)


def _experts(shape: tuple[int, ...], momentum: str) -> tuple[list[int], Tensor, Tensor, Any]:
    """Train experts on a 2 x 2 mesh, cut by matrix and by row."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    parameter = _parameter(shape, mesh, [Shard(0), Shard(1)])
    optimizer = Flora([("experts", parameter)], **{**CASE.flora, "momentum": momentum})
    sizes = _spy(optimizer, parameter)
    state = optimizer.state[parameter]
    whole = parameter.detach().full_tensor()
    return sizes, whole, state["column"].to_local(), dist.get_rank()


def _spy(optimizer: Flora, parameter: nn.Parameter) -> list[int]:
    """Take the steps; the sizes of the messages."""
    sizes: list[int] = []
    original = groups.MeshReducer.sum_

    def sum_(self: groups.MeshReducer, message_S: Tensor) -> None:
        sizes.append(message_S.numel())
        original(self, message_S)

    groups.MeshReducer.sum_ = sum_
    try:
        for step in range(STEPS):
            _set_gradient(parameter, step)
            optimizer.step()
    finally:
        groups.MeshReducer.sum_ = original
    return sizes


def _reference(shape: tuple[int, ...], momentum: str) -> Any:
    case = Case(settings={"momentum": momentum})
    reference = reference_of(case, {"experts": _values(shape, 0)})
    for step in range(STEPS):
        reference.step({"experts": _values(shape, 1 + step)})
    return reference


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend"])
@pytest.mark.parametrize("rows", [1, 5])
def test_experts_cut_by_matrix_and_row_keep_the_right_statistics(momentum: str, rows: int) -> None:
    # Incident: with one row, ranks that hold matrices 2 and 3 but no row kept the means of 0 and 1.
    shape = (4, rows, 16)
    reference = _reference(shape, momentum)
    start = {"experts": _values(shape, 0)}
    for _, weight, column, rank in pool_of(4)(_experts, shape, momentum):
        got = distances(start, reference.weights, {"experts": weight})
        assert got[1] < 1e-11
        matrices = slice(0, 2) if rank < 2 else slice(2, 4)
        torch.testing.assert_close(column, reference.state("experts")["column"][matrices])


def _whole_experts(momentum: str) -> tuple[list[int], Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    parameter = _parameter((3, 5, 16), mesh, [Shard(0)])
    optimizer = Flora([("experts", parameter)], **{**CASE.flora, "momentum": momentum})
    sizes = _spy(optimizer, parameter)
    return sizes, parameter.detach().full_tensor()


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend"])
def test_experts_that_are_whole_on_their_rank_send_one_number(momentum: str) -> None:
    reference = _reference((3, 5, 16), momentum)
    for sizes, weight in pool_of(2)(_whole_experts, momentum):
        assert sizes == [1] * STEPS  # whether any rank has a gradient
        start = {"experts": _values((3, 5, 16), 0)}
        assert distances(start, reference.weights, {"experts": weight})[1] < 1e-11


def _replicated_dtensor() -> tuple[list[int], Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    parameter = _parameter((3, 5, 16), mesh, [Replicate()])
    optimizer = Flora([("experts", parameter)], **CASE.flora)
    return _spy(optimizer, parameter), parameter.detach().full_tensor()


def test_a_replicated_dtensor_sends_nothing() -> None:
    reference = _reference((3, 5, 16), "flora")
    for sizes, weight in pool_of(2)(_replicated_dtensor):
        assert not sizes
        start = {"experts": _values((3, 5, 16), 0)}
        assert distances(start, reference.weights, {"experts": weight})[1] < 1e-11


def _columns(columns: int) -> tuple[Any, Any, int]:
    """State of a matrix whose columns are cut in two, and of the report."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = _parameter((5, columns), mesh, [Shard(1)])
    optimizer = Flora([("w", parameter)], **CASE.flora)
    _spy(optimizer, parameter)
    state = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, DTensor)}
    kinds = {k: (tuple(v.shape), tuple(v.to_local().shape)) for k, v in state.items()}
    measured = sum(v.to_local().nbytes for v in state.values())
    return kinds, measured, optimizer.report().state_bytes


@pytest.mark.parametrize(
    ("columns", "momentum"),
    [
        (32, ((5, 4, 2), (5, 2, 2))),  # cut between blocks: the unsharded state's shape
        (20, ((5, 4, 2), (5, 2, 2))),  # cut inside block 1 of 3, which both ranks keep
    ],
)
def test_column_shards_keep_the_blocks_they_touch(columns: int, momentum: Any) -> None:
    for kinds, measured, reported in pool_of(2)(_columns, columns):
        assert kinds["momentum"] == momentum
        assert kinds["row"] == ((5,), (5,))
        assert kinds["column"] == ((columns,), (columns,))
        assert measured == reported


def _partial_gradient() -> tuple[str, int]:
    """A gradient still to be summed, as sequence parallelism leaves it on norms."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = _parameter((8,), mesh, [Replicate()])
    parameter.grad = DTensor.from_local(_values((8,), 1), mesh, [Partial()])
    optimizer = Flora([("norm", parameter)], **CASE.flora)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), len(optimizer.state)
    return "", -1


def test_a_gradient_that_is_still_to_be_summed_is_refused() -> None:
    for message, kept in pool_of(2)(_partial_gradient):
        assert "'norm'" in message
        assert "redistribute" in message
        assert kept == 0
