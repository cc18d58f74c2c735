# SPDX-License-Identifier: Apache-2.0
"""Sketched gradients under DDP and FSDP2 as people use them: each is the run of one process.

The one process attaches too, and takes the mean of the ranks' losses; float64, so that only the
order of sums differs (1e-11, as in the battery).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from flora_dist import Flora
from flora_dist.core.step.gradient import SketchedGradient
from flora_dist.gradients.attach import Handle
from tests.battery.oracle import distances
from tests.battery.test_layouts import EXACT
from tests.conftest import pool_of
from tests.gradients import small
from tests.gradients.small import Small, attached, inputs, my_inputs, refused

STEPS = 6
Weights = dict[str, Tensor]
Uses = Callable[[int, int], bool]
"""Whether a rank uses ``extra`` at a step."""

USES: dict[str, Uses] = {
    "always": lambda _rank, _step: True,
    "on rank 0 alone": lambda rank, _step: rank == 0,
    "at even steps": lambda _rank, step: step % 2 == 0,
    "at odd steps, on the last rank": lambda rank, step: step % 2 == 1 and rank != 0,
    "never": lambda _rank, _step: False,
}


def one_process(uses: str, world_size: int) -> tuple[Weights, int]:
    """Weights and the steps that ``extra`` has counted."""
    model = Small().double()
    optimizer, _ = attached(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank, share in enumerate(inputs(step).double().chunk(world_size)):
            (model(share, use_extra=USES[uses](rank, step)) / world_size).backward()
        optimizer.step()
    return whole(model), steps_of(optimizer, model.extra.weight)


def several(host: str, uses: str, setting: str) -> tuple[Weights, int]:
    """The same on this rank's share, two micro-batches a step."""
    wrapped, model = SETTINGS[setting](host)
    optimizer, _ = attached(wrapped)
    for step in range(STEPS):
        optimizer.zero_grad()
        used = USES[uses](dist.get_rank(), step)
        for number, part in enumerate(my_inputs(step).double().chunk(2)):
            with synchronised(wrapped, setting != "no sync" or number == 1):
                (wrapped(part, use_extra=used) / 2).backward()
        optimizer.step()
    return whole(model), steps_of(optimizer, model.extra.weight)


@contextmanager
def synchronised(wrapped: Any, on: bool) -> Iterator[None]:
    """What the framework reduces itself: at this micro-batch, or later."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(on)
        yield
        return
    with nullcontext() if on else wrapped.no_sync():
        yield


def _double(host: str, **options: Any) -> tuple[nn.Module, Small]:
    model = Small().double()
    if host == "ddp":
        return nn.parallel.DistributedDataParallel(model, **options), model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model, model


SETTINGS: dict[str, Callable[[str], tuple[nn.Module, Small]]] = {
    "sync": _double,
    "no sync": _double,
    "bucket views": lambda host: _double(host, gradient_as_bucket_view=True),
    "find unused": lambda host: _double(host, find_unused_parameters=True),
    "static graph": lambda host: _double(host, static_graph=True),
    "cpu offload": lambda host: _double(host, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "no reshard": lambda host: _double(host, reshard_after_forward=False),
}


def whole(model: nn.Module) -> Weights:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def steps_of(optimizer: Flora, parameter: Tensor) -> int:
    return int(optimizer.state[parameter].get("step", 0))


def _check(host: str, uses: str, setting: str, world_size: int) -> None:
    start = whole(Small().double())
    expected, steps = one_process(uses, world_size)
    everyone = pool_of(world_size)(several, host, uses, setting)
    for weights, counted in everyone:
        assert counted == steps
        assert all(torch.equal(value, everyone[0][0][name]) for name, value in weights.items())
    weights = everyone[0][0]
    moved = [name for name in start if not torch.equal(start[name], expected[name])]
    for name in set(start) - set(moved):
        assert torch.equal(weights[name], start[name])
    parts = ({name: each[name] for name in moved} for each in (start, expected, weights))
    assert distances(*parts)[1] < EXACT


@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("host", small.HOSTS)
def test_parameters_that_some_ranks_do_not_use_count_as_zero_there(host: str, uses: str) -> None:
    _check(host, uses, "sync", world_size=3)


@pytest.mark.parametrize(
    ("host", "setting"),
    [
        ("ddp", "no sync"),
        ("ddp", "bucket views"),
        ("ddp", "find unused"),
        ("ddp", "static graph"),
        ("fsdp2", "no sync"),
        ("fsdp2", "cpu offload"),
        ("fsdp2", "no reshard"),
    ],
)
def test_a_setting_of_the_framework_changes_nothing(host: str, setting: str) -> None:
    _check(host, "always", setting, world_size=2)


# ---- what goes on behind our back


def unhooked(host: str) -> str:
    """The error of a step after which one hook had not fired."""
    wrapped, _ = small.HOSTS[host]()
    optimizer, handle = attached(wrapped)
    handle._hooks[0].remove()
    wrapped(my_inputs(0)).backward()
    return refused(optimizer.step, RuntimeError)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("host", small.HOSTS)
def test_a_hook_that_does_not_fire_is_noticed(host: str) -> None:
    for message in pool_of(2)(unhooked, host):
        assert "no full gradient may be left in .grad" in message
        assert "'extra.weight'" in message or "'first.weight'" in message


def asked_for_state(asks: bool) -> Weights:
    """A short run, with torch's DCP asking for state before it and in the middle."""
    wrapped, model = _double("fsdp2")
    optimizer, _ = attached(wrapped)
    if asks:
        get_optimizer_state_dict(wrapped, optimizer)
    for step in range(2):
        optimizer.zero_grad()
        wrapped(my_inputs(step).double()).backward()
        optimizer.step()
        if asks:
            saved = get_optimizer_state_dict(wrapped, optimizer)
            set_optimizer_state_dict(wrapped, optimizer, saved)
    return whole(model)


@pytest.mark.ranks(2)
def test_dcp_may_ask_for_the_state_before_the_first_step() -> None:
    asked, plain = (pool_of(2)(asked_for_state, asks)[0] for asks in (True, False))
    assert all(torch.equal(value, plain[name]) for name, value in asked.items())


# ---- what is averaged, and in which precision


def mean_sketches(handle: Handle) -> dict[str, list[Tensor]]:
    """Mean C of this rank's tiles, by parameter."""
    handle.gradients.reduce()
    found: dict[str, list[Tensor]] = {}
    for name in handle.gradients.flows:
        gradient = handle.gradients.mean_of(name)
        assert isinstance(gradient, SketchedGradient)
        found[name] = [tile.double() for tile in gradient.tiles]
    return found


def wire_distance(host: str, wire_dtype: str) -> float:
    """Of what travelled as ``wire_dtype`` to what travelled in fp32, relative."""
    found = []
    for wire in ("float32", wire_dtype):
        wrapped, _ = small.HOSTS[host]()
        _, handle = attached(wrapped, wire_dtype=wire)
        for part in my_inputs(0).chunk(3):
            (wrapped(part) / 3).backward()
        found.append(mean_sketches(handle))
    return distance(*found)


def distance(wanted: dict[str, list[Tensor]], got: dict[str, list[Tensor]]) -> float:
    pairs = [(w, g) for name in wanted for w, g in zip(wanted[name], got[name], strict=True)]
    errors = torch.stack([(w - g).norm() for w, g in pairs]).norm()
    return float(errors / torch.stack([w.norm() for w, _ in pairs]).norm())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("host", small.HOSTS)
def test_a_wire_in_bfloat16_is_within_its_rounding(host: str) -> None:
    # bfloat16 keeps 8 bits: each of two roundings is off by 2^-9 / sqrt(3) = 1.1e-3 at most on
    # average, that of a rank's own numbers and that of the sum.
    for distance_here in pool_of(2)(wire_distance, host, "bfloat16"):
        assert 0 < distance_here < 3e-3


def low_precision_distance() -> float:
    """Of C made from bf16 gradients to the float64 sketch of those gradients, relative."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    wrapped, model = small.on_fsdp2(mp_policy=policy)
    _, handle = attached(wrapped)
    exact: dict[str, Tensor] = {}
    for name, flow in handle.gradients.flows.items():
        accumulator, original = flow.accumulator, flow.accumulator.add_
        exact[name] = torch.zeros((), dtype=torch.float64)

        def spy(gradient: Tensor, name: str = name, original: Any = original) -> None:
            assert gradient.dtype == torch.bfloat16
            exact[name] = exact[name] + gradient.double()
            original(gradient)

        accumulator.add_ = spy  # type: ignore[method-assign]
    for part in my_inputs(0).chunk(3):
        wrapped(part).backward()
    wanted, got = {}, {}
    for name, flow in handle.gradients.flows.items():
        sketch_RB = flow.accumulator.sketch(torch.device("cpu"))[0].double()
        blocks = nn.functional.pad(exact[name], (0, -exact[name].shape[1] % sketch_RB.shape[1]))
        compressed = blocks.unflatten(1, (-1, sketch_RB.shape[1])) @ sketch_RB.T
        assert flow.accumulator.sums_ENKR is not None
        assert flow.accumulator.sums_ENKR.dtype == torch.float32
        wanted[name], got[name] = [compressed], [flow.accumulator.sums_ENKR[0].double()]
    del model
    return distance(wanted, got)


@pytest.mark.ranks(2)
def test_gradients_in_bfloat16_are_sketched_in_float32() -> None:
    # fp32 sums of products with +-1 / sqrt(2): no rounding to 8 bits anywhere.
    assert max(pool_of(2)(low_precision_distance)) < 1e-6


def divided() -> float:
    """Of the sketches under a divide factor of 1 to the ranks' sum, relative."""
    found = []
    for factor in (None, 1.0):
        wrapped: Any = small.on_fsdp2()[0]
        if factor is not None:
            wrapped.set_gradient_divide_factor(factor)
            wrapped.set_force_sum_reduction_for_comms(True)  # gloo knows no other factor
        _, handle = attached(wrapped)
        wrapped(my_inputs(0)).backward()
        found.append(mean_sketches(handle))
    # Only the root's group was told.
    root = {name for name in found[0] if not name.startswith("first")}
    scaled = {n: [2 * t for t in ts] if n in root else ts for n, ts in found[0].items()}
    return distance(scaled, found[1])


@pytest.mark.ranks(2)
def test_a_divide_factor_of_fsdp2_is_followed() -> None:
    assert max(pool_of(2)(divided)) < 1e-6


def on_meta() -> str:
    with torch.device("meta"):
        model = Small.__new__(Small)
        nn.Module.__init__(model)
        model.first, model.norm = nn.Linear(20, 24), nn.LayerNorm(24)
        model.extra, model.last = nn.Linear(24, 24), nn.Linear(24, 16)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return refused(lambda: attached(model), ValueError)


@pytest.mark.ranks(2)
def test_parameters_without_memory_are_refused() -> None:
    for message in pool_of(2)(on_meta):
        assert "to_empty" in message
