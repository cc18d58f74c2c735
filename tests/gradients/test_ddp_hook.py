# SPDX-License-Identifier: Apache-2.0
"""The communication hook: what a bucket gets is the estimate of the ranks' mean gradient.

The expected estimate is made by ``reference.py``, in float64, from each rank's own gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flora_dist
from flora_dist.core.sketch import keys
from flora_dist.core.sketch.keys import canonical_name
from flora_dist.ddp import FloraState, flora_hook
from flora_dist.frameworks import ddp_hook
from tests.battery import zoo
from tests.conftest import pool_of
from tests.gradients.oracle import GradientSketch, SketchedCase
from tests.gradients.small import Small, inputs, my_inputs, refused

pytestmark = pytest.mark.ranks(2)

SEED, RANK, BLOCK = 3, 2, 8
SKETCH = GradientSketch(SketchedCase(settings={"seed": SEED, "rank": RANK, "block": BLOCK}))
ROUNDING = 1e-12
"""Of float64 sums of some dozen products, relative."""
Gradients = dict[str, Tensor]


def hooked(
    model: nn.Module, settings: dict[str, Any] | None = None, **options: Any
) -> tuple[DistributedDataParallel, FloraState]:
    wrapped = DistributedDataParallel(model, **options)
    every = {"rank": RANK, "block": BLOCK, "seed": SEED, **(settings or {})}
    state = FloraState(model.named_parameters(), **every)
    wrapped.register_comm_hook(state, flora_hook)
    return wrapped, state


def gradients_of(model: nn.Module) -> Gradients:
    return {canonical_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


def mean_gradients(step: int, uses: Callable[[int], bool] = lambda _rank: True) -> Gradients:
    """Of the whole batch, in one process; ``uses``: whether a rank uses ``extra``."""
    model = Small().double()
    ranks = dist.get_world_size()
    for rank, share in enumerate(inputs(step).double().chunk(ranks)):
        (model(share, use_extra=uses(rank)) / ranks).backward()
    return gradients_of(model)


def worst(got: Gradients, mean: Gradients, step: int) -> float:
    """Distance of the gradients to the estimates of an iteration, of the worst parameter."""
    assert got.keys() == mean.keys()
    expected = {name: SKETCH.seen(name, gradient, step) for name, gradient in mean.items()}
    return max(float((got[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


# ---- what arrives


@contextmanager
def buckets_per_iteration() -> Iterator[list[int]]:
    """How many buckets each iteration had."""
    original, counts = FloraState.count, [0]

    def count(self: FloraState, bucket: Any) -> None:
        counts[-1] += 1
        original(self, bucket)
        if bucket.is_last():
            counts.append(0)

    with patch.object(FloraState, "count", count):
        yield counts


def over_steps(options: dict[str, Any]) -> tuple[list[float], list[int]]:
    wrapped, state = hooked(Small().double(), **options)
    found = []
    with buckets_per_iteration() as buckets:
        for step in range(3):
            wrapped.zero_grad()
            wrapped(my_inputs(step).double()).backward()
            found.append(worst(gradients_of(wrapped), mean_gradients(step), step + 1))
            assert state.iteration == step + 1
    return found, buckets[:-1]


@pytest.mark.parametrize(
    ("options", "buckets"),
    [
        ({}, [1, 1, 1]),
        ({"gradient_as_bucket_view": True}, [1, 1, 1]),
        # A kilobyte a bucket, from the second iteration on: DDP then builds them again.
        ({"bucket_cap_mb": 1e-3}, [1, 3, 3]),
        ({"bucket_cap_mb": 1e-3, "gradient_as_bucket_view": True}, [1, 3, 3]),
        ({"static_graph": True}, [1, 1, 1]),
        ({"find_unused_parameters": True}, [1, 1, 1]),
    ],
    ids=str,
)
def test_a_bucket_gets_the_estimate_of_the_mean_gradient(
    options: dict[str, Any], buckets: list[int]
) -> None:
    for found, counted in pool_of(2)(over_steps, options):
        assert max(found) < ROUNDING
        assert counted == buckets


def zoo_in_other_strides() -> list[float]:
    model = zoo.build(torch.float64)
    with torch.no_grad():  # as channels_last leaves a convolution's weight
        weight = model.conv.weight
        model.conv.weight = nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))
    wrapped, _ = hooked(model, bucket_cap_mb=1e-3)
    found = []
    for step in range(2):
        alone = zoo.build(torch.float64)
        alone(zoo.batch(step, 12)).backward()
        wrapped.zero_grad()
        wrapped(zoo.share(zoo.batch(step, 12), dist.get_rank(), 2)).backward()
        found.append(worst(gradients_of(wrapped), gradients_of(alone), step + 1))
    return found


def test_batches_of_matrices_convolutions_ties_and_ragged_blocks_are_estimated_too() -> None:
    for found in pool_of(2)(zoo_in_other_strides):
        assert max(found) < ROUNDING


def accumulated() -> float:
    wrapped, state = hooked(Small().double())
    parts = my_inputs(0).double().chunk(3)
    for number, part in enumerate(parts, start=1):
        with nullcontext() if number == len(parts) else wrapped.no_sync():
            (wrapped(part) / len(parts)).backward()
    assert state.iteration == 1
    return worst(gradients_of(wrapped), mean_gradients(0), 1)


def test_micro_batches_cost_one_reduction_of_their_sum() -> None:
    assert max(pool_of(2)(accumulated)) < ROUNDING


def unused(by_all: bool) -> list[float]:
    """``extra`` is used by rank 0 alone, or in the second iteration by nobody."""
    wrapped, state = hooked(Small().double(), find_unused_parameters=True, bucket_cap_mb=1e-3)
    found = []
    for step in range(3):
        uses = [lambda rank: rank == 0, lambda _rank: not by_all, lambda _rank: True][step]
        wrapped.zero_grad()
        wrapped(my_inputs(step).double(), use_extra=uses(dist.get_rank())).backward()
        found.append(worst(gradients_of(wrapped), mean_gradients(step, uses), step + 1))
    assert state.iteration == 3
    return found


@pytest.mark.parametrize("by_all", [False, True])
def test_a_rank_that_does_not_use_a_parameter_counts_as_zero(by_all: bool) -> None:
    for found in pool_of(2)(unused, by_all):
        assert max(found) < ROUNDING


def started_late() -> list[float]:
    """Distances to the mean gradient itself."""
    wrapped, _ = hooked(Small().double(), {"start_iteration": 2})
    found = []
    for step in range(3):
        wrapped.zero_grad()
        wrapped(my_inputs(step).double()).backward()
        got, mean = gradients_of(wrapped), mean_gradients(step)
        found.append(max(float((got[n] - mean[n]).norm() / mean[n].norm()) for n in mean))
    found.append(worst(got, mean, 3))
    return found


def test_before_its_first_iteration_gradients_travel_as_they_are() -> None:
    for first, second, third, estimated in pool_of(2)(started_late):
        assert max(first, second, estimated) < ROUNDING
        # An estimate of ratio 4 is off by sqrt(3).
        assert third > 1


def in_float32(wire_dtype: str) -> float:
    model = Small()
    wrapped, _ = hooked(model, {"wire_dtype": wire_dtype})
    wrapped(my_inputs(0)).backward()
    got = {name: gradient.double() for name, gradient in gradients_of(wrapped).items()}
    return worst(got, mean_gradients(0), 1)


# fp32: products and sums of some dozen numbers, 6e-8 each. bfloat16: every number of the message
# is rounded to 8 bits, and so is their sum: 2^-9 each, thrice.
@pytest.mark.parametrize(("wire_dtype", "most"), [("float32", 2e-6), ("bfloat16", 6e-3)])
def test_the_wire_dtype_costs_its_rounding_alone(wire_dtype: str, most: float) -> None:
    assert max(pool_of(2)(in_float32, wire_dtype)) < most


def other_keys() -> float:
    original = keys.derive_key

    def of_this_rank(**parts: Any) -> int:
        return int(original(**parts)) ^ dist.get_rank()

    with patch.object(keys, "derive_key", of_this_rank):
        wrapped, _ = hooked(Small().double())
        wrapped(my_inputs(0).double()).backward()
    return worst(gradients_of(wrapped), mean_gradients(0), 1)


def test_keys_that_ranks_do_not_share_are_seen() -> None:
    assert max(pool_of(2)(other_keys)) > 1e6 * ROUNDING


def overlapping(lock: bool) -> int:
    """How many threads were at their products at once, at most."""
    inside, most = 0, 0

    @contextmanager
    def slow(_: object) -> Iterator[None]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        yield
        inside -= 1

    held = ddp_hook._full_products if lock else nullcontext()
    with (
        patch.object(ddp_hook, "exact_products", slow),
        patch.object(ddp_hook, "_full_products", held),
    ):
        wrapped, _ = hooked(Small(), bucket_cap_mb=1e-3)
        for _ in range(3):  # several buckets from the second iteration on
            wrapped(my_inputs(0)).backward()
    return most


def test_threads_do_not_change_the_precision_of_products_under_each_other() -> None:
    assert pool_of(2)(overlapping, True) == [1, 1]
    assert max(pool_of(2)(overlapping, False)) > 1


# ---- what is refused


def of_backward(given: str) -> str:
    """The error of a backward pass."""
    model: nn.Module = Small()
    settings: dict[str, Any] = {"rank": RANK, "block": BLOCK}
    params = list(model.named_parameters())
    x = my_inputs(0)
    if given == "too few":
        params = params[1:]
    if given == "seeds":
        settings["seed"] = dist.get_rank()
    if given == "names":
        params = [(f"{dist.get_rank()}.{name}", tensor) for name, tensor in params]
    if given == "sparse":
        model, x = nn.Embedding(16, 32, sparse=True), torch.arange(4)
        params = list(model.named_parameters())
    wrapped = DistributedDataParallel(model)
    state = FloraState(params, **settings)
    if given == "a load on one rank":
        state.load_state_dict({**state.state_dict(), "iteration": 5 * dist.get_rank()})
    wrapped.register_comm_hook(state, flora_hook)
    return refused(lambda: wrapped(x).sum().backward(), Exception)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("too few", "flora_hook must know every parameter that DDP reduces; one of shape (24, 20)"),
        ("seeds", "all ranks must give FloraState the same settings"),
        ("names", "all ranks must give FloraState the same settings"),
        ("a load on one rank", "all ranks must give FloraState the same settings"),
        ("sparse", "flora_hook needs dense gradients; those of a bucket are torch.sparse_coo"),
    ],
)
def test_what_would_sum_noise_is_refused_on_every_rank(given: str, message: str) -> None:
    for said in pool_of(2)(of_backward, given):
        assert message in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 64}, "rank must be below block"),
        ({"rank": None}, "rank must be a whole number of at least 1; got None"),
        ({"block": 48}, "block must be a power of two"),
        ({"sketch": "fourier"}, "sketch must be one of"),
        ({"wire_dtype": "int8"}, "wire_dtype must be one of float32, bfloat16"),
        ({"rank": "block"}, "got 'block' and wire_bits=None. Pass a number, or wire_bits=4"),
        ({"wire_bits": 3}, "wire_bits must be one of 8, 4, 2, 1; got 3"),
        ({"wire_bits": 16}, "wire_bits must be one of 8, 4, 2, 1; got 16"),
        ({"wire_bits": 4, "sketch": "gaussian"}, "few bits need sketch='hadamard'"),
        ({"start_iteration": -1}, "start_iteration must be a whole number of at least 0; got -1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_right_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloraState(Small().named_parameters(), **settings)


def test_the_package_shows_the_module_without_loading_it_first() -> None:
    assert "ddp" in dir(flora_dist)
    assert flora_dist.ddp.flora_hook is flora_hook
