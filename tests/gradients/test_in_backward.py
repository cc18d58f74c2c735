# SPDX-License-Identifier: Apache-2.0
"""Steps in backward: equal to steps after it, bit for bit; gradients are gone; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import flora_dist
from flora_dist import Flora
from flora_dist.core.layouts.dtensor import local_of
from flora_dist.gradients.in_backward import InBackward
from tests.bench.memory import LiveBytes
from tests.conftest import pool_of
from tests.gradients import small
from tests.gradients.small import SETTINGS, Small, attached, inputs, refused

STEPS = 3


def trained(
    model: nn.Module,
    optimizer: Flora,
    handle: InBackward | None,
    *,
    micro_batches: int = 1,
    rows: Callable[[int], torch.Tensor] = inputs,
) -> list[torch.Tensor]:
    """Weights and state after some steps; ``handle`` None: stepped after backward."""
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        for number in range(micro_batches):
            is_last = number == micro_batches - 1
            with nullcontext() if handle is None or is_last else handle.accumulating():
                # In the last step one matrix has no gradient: it is left to step().
                model(rows(10 * step + number), use_extra=step < STEPS - 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [v for p in model.parameters() for v in optimizer.state[p].values()]
    return [*model.parameters(), *(torch.as_tensor(v) for v in state)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(local_of(one), local_of(other)) for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", ["blend", "flora_strict"])
def test_one_process_steps_in_backward_as_after_it(dtype: torch.dtype, momentum: str) -> None:
    runs = []
    for in_backward in (False, True):
        model = Small().to(dtype)
        settings = SETTINGS | {"momentum": momentum, "weight_decay": 0.1}
        optimizer = Flora(model.named_parameters(), **settings)
        handle = flora_dist.step_in_backward(model, optimizer) if in_backward else None
        runs.append(trained(model, optimizer, handle, rows=lambda step: inputs(step).to(dtype)))
    assert same(*runs)


@pytest.mark.parametrize("bits", [None, 4])
def test_accumulated_sketches_are_stepped_in_the_last_backward(bits: int | None) -> None:
    runs = []
    for in_backward in (False, True):
        model = Small()
        optimizer, _ = attached(model, "compressed", gradient_bits=bits)
        handle = flora_dist.step_in_backward(model, optimizer) if in_backward else None
        runs.append(trained(model, optimizer, handle, micro_batches=3))
    assert same(*runs)


def sharded_runs(level: str) -> tuple[bool, list[int]]:
    """Whether both ways end alike on this rank, and messages of the steps of one backward."""
    runs, sent = [], []
    for in_backward in (False, True):
        model, _ = small.on_fsdp2()
        optimizer = Flora(model.named_parameters(), **SETTINGS)
        if level != "dense":
            flora_dist.attach(model, optimizer, level)
        handle = flora_dist.step_in_backward(model, optimizer) if in_backward else None
        micro_batches = 1 if level == "dense" else 2
        with small.summed() as sums:
            runs.append(
                trained(model, optimizer, handle, micro_batches=micro_batches, rows=small.my_inputs)
            )
        sent.append(len(sums))
    return same(*runs), sent


@pytest.mark.ranks(2)
@pytest.mark.parametrize("level", ["dense", "sharded"])
def test_fsdp2_steps_a_module_in_backward_with_one_message(level: str) -> None:
    for is_same, (after, within) in pool_of(2)(sharded_runs, level):
        assert is_same
        # Two modules; where a matrix has no gradient in the last step, step() takes the others.
        assert (after, within) == (STEPS, 2 * STEPS)


def deep(layers: int = 8, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def test_backward_holds_one_gradient_at_a_time() -> None:
    bytes_of_one, peaks = 4 * 64 * 64, []
    for in_backward in (False, True):
        model = deep()
        optimizer = Flora(model.named_parameters(), lr=1e-3, momentum="none", rank=None)
        if in_backward:
            flora_dist.step_in_backward(model, optimizer)
        for _ in range(2):
            loss = model(torch.ones(1, 64)).square().mean()
            with LiveBytes(known=model.parameters()) as live:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(live.peak)
    assert peaks[0] > 8 * bytes_of_one
    assert peaks[1] < 4 * bytes_of_one  # one gradient, and what its step makes of it


def test_norms_and_clipping_of_all_gradients_are_refused() -> None:
    model = Small()
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    handle = flora_dist.step_in_backward(model, optimizer)
    for read in (optimizer.grad_norm, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"stepped and freed.*clip or growth"):
            read()
    handle.remove()
    model(inputs(0)).backward()
    assert optimizer.grad_norm() > 0


def test_a_second_backward_without_a_step_is_refused() -> None:
    model = Small()
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    flora_dist.step_in_backward(model, optimizer)
    model(inputs(0)).backward()
    with pytest.raises(RuntimeError, match=r"after it was stepped in backward.*accumulating\(\)"):
        model(inputs(1)).backward()


def test_skipping_whole_steps_is_refused_before_anything_changes() -> None:
    model = Small()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Flora(model.named_parameters(), **SETTINGS, skip_nonfinite=True)
    flora_dist.step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match="skip_nonfinite skips the whole step"):
        model(inputs(0)).backward()
    assert same(before, [*model.parameters()])
    assert not optimizer.state


def test_what_cannot_step_in_backward_is_refused_at_once() -> None:
    model = Small()
    with pytest.raises(TypeError, match="needs a Flora; got AdamW"):
        flora_dist.step_in_backward(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    optimizer, _ = attached(model, "fused")
    with pytest.raises(ValueError, match="form no gradient"):
        flora_dist.step_in_backward(model, optimizer)
    optimizer = Flora(Small().named_parameters(), **SETTINGS)
    engine = Small()
    engine.zero_optimization = lambda: True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="engine averages gradients in buckets"):
        flora_dist.step_in_backward(engine, optimizer)
    flora_dist.step_in_backward(model := Small(), optimizer)
    with pytest.raises(ValueError, match="stepped in backward once"):
        flora_dist.step_in_backward(model, optimizer)


def refusals() -> list[str]:
    found = []
    wrapped, _ = small.on_ddp()
    optimizer = Flora(wrapped.named_parameters(), **SETTINGS)
    found.append(refused(lambda: flora_dist.step_in_backward(wrapped, optimizer), ValueError))
    flat = FullyShardedDataParallel(Small(), use_orig_params=True, device_id=torch.device("cpu"))
    found.append(refused(lambda: flora_dist.step_in_backward(flat, optimizer), ValueError))
    whole, _ = small.on_fsdp2()
    sketched, _ = attached(whole, "compressed")
    found.append(refused(lambda: flora_dist.step_in_backward(whole, sketched), ValueError))
    return found


@pytest.mark.ranks(2)
def test_hosts_whose_gradients_are_complete_after_backward_are_refused() -> None:
    for ddp, fsdp1, averaged in pool_of(2)(refusals):
        assert "DDP holds buckets" in ddp
        assert "flat gradient of a whole unit" in fsdp1
        assert "averaged over ranks once per step" in averaged
