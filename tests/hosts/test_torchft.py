# SPDX-License-Identifier: Apache-2.0
"""torchft's optimizer wrapper and DiLoCo around Flora, with a lighthouse and managers of its own.

One replica group: with an outer step of 1 and no momentum DiLoCo is the plain loop; of two
processes with FSDP2; with sketched gradients. Two groups, each a process: their gradients are
averaged, and one that comes late heals from the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.fsdp import fully_shard

import flora_dist
from flora_dist import Flora
from tests.conftest import pool_of
from tests.hosts.small import whole_weights
from tests.hosts.trainer_runs import SKETCHES

pytest.importorskip("torchft", reason="torchft is not installed (docs/hosts/fault_tolerance.md)")
pytestmark = pytest.mark.slow
STEPS = 6


def build(seed: int = 3) -> tuple[nn.Module, Flora]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    return model, Flora(model.named_parameters(), lr=1e-2, rank=4, block=16, kappa=3)


def backward(model: nn.Module, step: int, part: slice = slice(None)) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(8, 16, generator=generator)[part]).square().mean().backward()


def plain_loop(steps: int, **sketches: Any) -> dict[str, Tensor]:
    model, flora = build()
    if sketches:
        flora_dist.attach(model, flora, **sketches)
    for step in range(steps):
        flora.zero_grad()
        backward(model, step)
        flora.step()
    return dict(model.named_parameters())


@contextmanager
def lighthouse_of(least: int) -> Iterator[str]:
    """Its address; ``least``: groups that a step needs."""
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=least, join_timeout_ms=100)
    try:
        yield lighthouse.address()
    finally:
        lighthouse.shutdown()


@contextmanager
def manager_of(
    model: nn.Module,
    flora: Flora,
    lighthouse: str,
    *,
    group: int = 0,
    is_async: bool = True,
    place: tuple[int, int] = (0, 1),
    port: int = 0,
) -> Iterator[Any]:
    """``place``: of this process in its group, and the group's size; ``port``: its store's."""
    from torchft import Manager, ProcessGroupGloo

    rank, ranks = place

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        flora.load_state_dict(state["optimizer"])

    store = TCPStore("127.0.0.1", port, is_master=port == 0, wait_for_workers=False)
    if ranks > 1 and rank == 0:
        dist.broadcast_object_list([store.port])
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        state_dict=lambda: {"model": model.state_dict(), "optimizer": flora.state_dict()},
        load_state_dict=load,
        min_replica_size=1,
        use_async_quorum=is_async,
        replica_id=f"group{group}",
        rank=rank,
        world_size=ranks,
        store_addr="127.0.0.1",
        store_port=store.port,
        hostname="127.0.0.1",
        lighthouse_addr=lighthouse,
    )
    try:
        yield manager
    finally:
        manager.shutdown()


def assert_equal(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_the_wrapper_is_the_plain_loop_and_leaves_out_what_is_not_committed() -> None:
    from torchft import Optimizer

    model, flora = build()
    with lighthouse_of(1) as address, manager_of(model, flora, address) as manager:
        optimizer = Optimizer(manager, flora)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        assert_equal(model, plain_loop(STEPS))
        optimizer.zero_grad()
        backward(model, STEPS)
        manager.report_error(RuntimeError("a replica has gone"))
        optimizer.step()
    assert_equal(model, plain_loop(STEPS))
    assert {state["step"] for state in flora.state.values()} == {STEPS}


def test_diloco_of_one_replica_is_the_plain_loop() -> None:
    from torchft.local_sgd import DiLoCo

    model, flora = build()
    outer = torch.optim.SGD(model.parameters(), lr=1.0)
    with (
        lighthouse_of(1) as address,
        manager_of(model, flora, address, is_async=False) as manager,
        DiLoCo(manager, [model], flora, outer, sync_every=2, pin_memory=False),
    ):
        for step in range(STEPS):
            flora.zero_grad()
            backward(model, step)
            flora.step()
        assert manager.current_step() == STEPS // 2
    for name, expected in plain_loop(STEPS).items():
        torch.testing.assert_close(dict(model.named_parameters())[name], expected)


# ---- sketched gradients


def test_a_group_with_sketched_gradients_is_the_plain_loop_with_them() -> None:
    from torchft import Optimizer

    model, flora = build()
    flora_dist.attach(model, flora, **SKETCHES)
    with lighthouse_of(1) as address, manager_of(model, flora, address) as manager:
        optimizer = Optimizer(manager, flora)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    assert_equal(model, plain_loop(STEPS, **SKETCHES))


def test_a_sketch_that_is_averaged_over_groups_is_refused_and_the_step_left_out() -> None:
    from torchft import Optimizer

    model, flora = build()
    flora_dist.attach(model, flora, **SKETCHES)
    with lighthouse_of(1) as address, manager_of(model, flora, address) as manager:
        optimizer = Optimizer(manager, flora)
        optimizer.zero_grad()
        backward(model, 0)
        manager.allreduce(model[0].weight.grad).wait()
        assert "kept as sketches" in str(manager.errored())
        optimizer.step()
    assert not flora.state


# ---- a group of two processes


def in_shards() -> dict[str, Tensor]:
    from torchft import Optimizer

    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, _ = build()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (ranks,)))
    flora = Flora(model.named_parameters(), lr=1e-2, rank=4, block=16, kappa=3)
    with ExitStack() as stack:
        address = address_for_all(stack, least=1)
        port = [0]
        if rank > 0:
            dist.broadcast_object_list(port)
        host = manager_of(model, flora, address, place=(rank, ranks), port=port[0])
        optimizer = Optimizer(stack.enter_context(host), flora)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step, slice(4 * rank, 4 * rank + 4))
            optimizer.step()
        dist.barrier()  # whoever leaves first would end the other's step
        return whole_weights(model)


@pytest.mark.ranks(2)
def test_a_group_of_two_processes_with_fsdp2_is_the_plain_loop() -> None:
    expected = plain_loop(STEPS)
    for found in pool_of(2)(in_shards):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


# ---- two groups


def address_for_all(stack: ExitStack, least: int) -> str:
    """Of the lighthouse that rank 0 keeps."""
    said = [stack.enter_context(lighthouse_of(least)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said)
    return str(said[0])


def step_of(optimizer: Any, manager: Any, model: nn.Module, part: slice) -> None:
    optimizer.zero_grad()
    backward(model, manager.current_step(), part)
    for work in [manager.allreduce(parameter.grad) for parameter in model.parameters()]:
        work.wait()
    optimizer.step()


def in_halves() -> dict[str, Tensor]:
    from torchft import Optimizer

    group = dist.get_rank()
    model, flora = build(seed=3 + group)  # a first step takes the first group's weights
    with ExitStack() as stack:
        address = address_for_all(stack, least=2)
        # Healed beside the forward, the second group's first gradient would not count.
        host = manager_of(model, flora, address, group=group, is_async=False)
        manager = stack.enter_context(host)
        optimizer = Optimizer(manager, flora)
        while manager.current_step() < STEPS:
            step_of(optimizer, manager, model, slice(4 * group, 4 * group + 4))
        dist.barrier()  # whoever leaves first would end the other's step
    return dict(model.named_parameters())


def healed() -> tuple[int, dict[str, Tensor]]:
    """Steps, and weights; the second group comes after three steps with weights of its own."""
    from torchft import Optimizer

    group = dist.get_rank()
    model, flora = build(seed=3 + group)
    store = dist.distributed_c10d._get_default_store()
    with ExitStack() as stack:
        address = address_for_all(stack, least=1)
        if group == 1:
            dist.barrier()
        manager = stack.enter_context(manager_of(model, flora, address, group=group))
        optimizer = Optimizer(manager, flora)
        last = None
        while last is None or manager.current_step() < last:
            # All take the same samples: their mean is one group's gradient, whoever is there.
            step_of(optimizer, manager, model, slice(None))
            if group == 0 and manager.current_step() == 3:
                dist.barrier()
            if group == 0 and last is None and manager.num_participants() == 2:
                store.set("last", str(manager.current_step() + STEPS))
            if store.check(["last"]):
                last = int(store.get("last"))
        dist.barrier()
    return manager.current_step(), dict(model.named_parameters())


def both_ways() -> tuple[dict[str, Tensor], tuple[int, dict[str, Tensor]]]:
    return in_halves(), healed()


@pytest.mark.ranks(2)
def test_two_groups_are_the_plain_loop_and_one_that_comes_late_heals() -> None:
    expected = plain_loop(STEPS)
    for halves, (steps, late) in pool_of(2)(both_ways):
        for name, value in expected.items():
            torch.testing.assert_close(halves[name], value)
        assert steps > 3 + STEPS
        assert all(torch.equal(late[name], value) for name, value in plain_loop(steps).items())
