# SPDX-License-Identifier: Apache-2.0
"""``attach`` on two ranks: what is refused, what ``remove`` restores, and what is let go."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from flora_dist import Flora
from flora_dist.gradients.in_backward import step_in_backward
from tests.conftest import pool_of
from tests.gradients import small
from tests.gradients.small import attached, refused


def refusals_of_hosts() -> dict[str, str]:
    found = {}
    wrapped, _ = small.on_ddp()
    found["sharded on ddp"] = refused(lambda: attached(wrapped, "sharded"), ValueError)
    found["ddp inside"] = refused(lambda: attached(nn.Sequential(wrapped)), ValueError)
    wrapped, _ = small.on_ddp()
    wrapped.register_comm_hook(None, fp16_compress_hook)  # type: ignore[operator]
    found["comm hook"] = refused(lambda: attached(wrapped), ValueError)
    wrapped, model = small.on_ddp()
    every = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in every)
    found["all sketched"] = refused(lambda: attached(wrapped), ValueError)
    sharded: Any = small.on_fsdp2()[0]
    sharded.set_reduce_scatter_unused_params(True)
    found["unused"] = refused(lambda: attached(sharded), ValueError)
    sharded = small.on_fsdp2()[0]
    optimizer, _ = attached(sharded)
    sharded(small.my_inputs(0)).backward()
    sharded.set_reduce_scatter_unused_params(True)
    found["unused later"] = refused(optimizer.step, ValueError)
    return found


@pytest.mark.ranks(2)
def test_hosts_that_would_compute_something_else_are_refused() -> None:
    for found in pool_of(2)(refusals_of_hosts):
        assert "shards nothing" in found["sharded on ddp"]
        assert "takes the DDP module itself" in found["ddp inside"]
        assert "a communication hook" in found["comm hook"]
        assert "needs a parameter of its own" in found["all sketched"]
        assert "set_reduce_scatter_unused_params()" in found["unused"]
        assert "set_reduce_scatter_unused_params()" in found["unused later"]


def removed(host: str) -> bool:
    """Whether a run after ``remove`` is that of a model nobody attached."""
    wrapped, _ = small.HOSTS[host]()
    optimizer, handle = attached(wrapped)
    wrapped(small.my_inputs(9)).backward()
    handle.remove()
    other, _ = small.HOSTS[host]()
    dense = Flora(other.named_parameters(), **small.SETTINGS)
    for step in range(2):
        for module, chosen in ((wrapped, optimizer), (other, dense)):
            chosen.zero_grad()
            module(small.my_inputs(step)).backward()
            chosen.step()
    pairs = zip(wrapped.parameters(), other.parameters(), strict=True)
    return all(torch.equal(ours.detach(), theirs.detach()) for ours, theirs in pairs)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("host", small.HOSTS)
def test_remove_restores_the_framework(host: str) -> None:
    assert pool_of(2)(removed, host) == [True, True]


def let_go(host: str, level: str) -> list[bool]:
    """Whether a model and what holds its sums end with the last name for the model."""
    wrapped, model = small.HOSTS[host]()
    optimizer, handle = attached(wrapped, level)
    wrapped(small.my_inputs(0)).backward()
    optimizer.step()
    seen = [ref(model), ref(wrapped), ref(optimizer), ref(handle.gradients)]
    del wrapped, model, optimizer, handle
    gc.collect()
    return [each() is None for each in seen]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("level", ["compressed", "fused"])
@pytest.mark.parametrize("host", small.HOSTS)
def test_a_model_that_is_dropped_ends_with_its_gradients(host: str, level: str) -> None:
    for found in pool_of(2)(let_go, host, level):
        assert found == [True] * 4


def let_go_stepped_in_backward() -> list[bool]:
    wrapped, _ = small.on_fsdp2()
    optimizer = Flora(wrapped.named_parameters(), **small.SETTINGS)
    handle = step_in_backward(wrapped, optimizer)
    wrapped(small.my_inputs(0)).backward()
    optimizer.step()
    seen = [ref(wrapped), ref(optimizer), ref(handle)]
    del wrapped, _, optimizer, handle
    gc.collect()
    return [each() is None for each in seen]


@pytest.mark.ranks(2)
def test_a_model_that_is_dropped_ends_with_its_steps_in_backward() -> None:
    for found in pool_of(2)(let_go_stepped_in_backward):
        assert found == [True] * 3


def test_a_model_learns_on_by_another_optimizer_when_its_own_is_dropped() -> None:
    model, x = small.Small(), small.inputs(0)
    optimizer, handle = attached(model, "fused")
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    del optimizer, handle
    gc.collect()
    model(x).backward()
    expected = small.Small()
    expected.load_state_dict(model.state_dict())
    expected(x).backward()
    assert torch.equal(torch.as_tensor(model.first.weight.grad), expected.first.weight.grad)
