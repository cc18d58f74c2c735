# SPDX-License-Identifier: Apache-2.0
"""torchft's optimizer wrapper and DiLoCo around Flora, with a lighthouse and a manager of its own.

One replica group: with an outer step of 1 and no momentum DiLoCo is the plain loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore

from flora_dist import Flora

pytest.importorskip("torchft", reason="torchft is not installed (docs/hosts/fault_tolerance.md)")
pytestmark = pytest.mark.slow
STEPS = 6


def build() -> tuple[nn.Module, Flora]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    return model, Flora(model.named_parameters(), lr=1e-2, rank=4, block=16, kappa=3)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(8, 16, generator=generator)).square().mean().backward()


def plain_loop(steps: int) -> dict[str, Tensor]:
    model, flora = build()
    for step in range(steps):
        flora.zero_grad()
        backward(model, step)
        flora.step()
    return dict(model.named_parameters())


@contextmanager
def manager_of(model: nn.Module, flora: Flora, *, is_async: bool) -> Iterator[Any]:
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        state_dict=lambda: {"model": model.state_dict(), "optimizer": flora.state_dict()},
        load_state_dict=lambda _: None,
        min_replica_size=1,
        use_async_quorum=is_async,
        replica_id="only",
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        hostname="127.0.0.1",
        lighthouse_addr=lighthouse.address(),
    )
    try:
        yield manager
    finally:
        manager.shutdown()
        lighthouse.shutdown()


def assert_equal(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_the_wrapper_is_the_plain_loop_and_leaves_out_what_is_not_committed() -> None:
    from torchft import Optimizer

    model, flora = build()
    with manager_of(model, flora, is_async=True) as manager:
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
        manager_of(model, flora, is_async=False) as manager,
        DiLoCo(manager, [model], flora, outer, sync_every=2, pin_memory=False),
    ):
        for step in range(STEPS):
            flora.zero_grad()
            backward(model, step)
            flora.step()
        assert manager.current_step() == STEPS // 2
    for name, expected in plain_loop(STEPS).items():
        torch.testing.assert_close(dict(model.named_parameters())[name], expected)
