# SPDX-License-Identifier: Apache-2.0
"""What compressed gradients send and hold: exact counts at the collectives, and a bound on memory.

The larger tables are `python -m tests.bench.wire`. Here every number follows from shapes by hand.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flora_dist.gradients import average as routes
from flora_dist.gradients import record_pieces
from flora_dist.gradients.cycle import Gradients
from flora_dist.trainer.traffic import Traffic
from tests.battery.test_layouts import EXACT
from tests.bench.wire_counter import Collectives, Payload
from tests.bench.wire_counts import payloads
from tests.bench.wire_memory import Peak, peak
from tests.bench.wire_setups import Setup, start
from tests.conftest import launched_pool_of, pool_of
from tests.gradients import layouts
from tests.gradients.oracle import SketchedCase

# Two matrices of 80 x 96 and 96 x 80, biases and a norm per layer. Blocks of 32: a row of 96 has 3,
# a row of 80 two and a half, which are 3 as well. Ratio 8: 4 numbers for each.
LAYERS, WIDTH, INNER = 3, 96, 80
PER_ROW = 3 * 4
MATRICES = 2 * LAYERS
VECTORS = LAYERS * (WIDTH + WIDTH + INNER + WIDTH)
SMALL = Setup(
    layout="ddp",
    model=("stack", (("layers", LAYERS), ("width", WIDTH), ("inner", INNER))),
    ratio=8,
    block=32,
)

# Rows are shared out in equal numbers, the last rank has fewer; every line begins with one number
# per matrix that says whether there is a gradient.
LINE_OF_HALVES = MATRICES + LAYERS * (40 + 48) * PER_ROW
LINE_OF_THIRDS = MATRICES + LAYERS * (27 + 32) * PER_ROW
SKETCHES = {
    "ddp x2": [("all_reduce", MATRICES + LAYERS * (INNER + WIDTH) * PER_ROW)],
    "fsdp2 x2": [("reduce_scatter", 2 * LINE_OF_HALVES)],
    "fsdp2 x3": [("reduce_scatter", 3 * LINE_OF_THIRDS)],
    "hsdp 2x2": [("reduce_scatter", 2 * LINE_OF_HALVES), ("all_reduce", LINE_OF_HALVES)],
}
# What FSDP2 reduces itself; 80 is no multiple of 3.
OWN = {
    "ddp x2": VECTORS,
    "fsdp2 x2": VECTORS,
    "fsdp2 x3": VECTORS + LAYERS,
    "hsdp 2x2": VECTORS + VECTORS // 2,
}
RANKS = {"ddp x2": 2, "fsdp2 x2": 2, "fsdp2 x3": 3, "hsdp 2x2": 4}


def _sent(layout: str, **changes: Any) -> list[Payload]:
    setup = replace(SMALL, layout=layout.split()[0], **changes)
    everyone = pool_of(RANKS[layout])(payloads, setup)
    assert all(sent == everyone[0] for sent in everyone)
    return everyone[0]


def _for(sent: list[Payload], purpose: str) -> list[tuple[str, int]]:
    return [(p.kind, p.elements) for p in sent if p.purpose == purpose]


def _elements(sent: list[Payload], purpose: str) -> int:
    return sum(elements for _, elements in _for(sent, purpose))


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("layout", SKETCHES)
def test_a_step_sends_one_sketch_of_each_matrix_however_many_micro_batches(
    layout: str, micro_batches: int
) -> None:
    sent = _sent(layout, micro_batches=micro_batches)
    assert _for(sent, "sketches") == SKETCHES[layout]
    assert _elements(sent, "gradients") == OWN[layout]


@pytest.mark.parametrize("layout", ["ddp x2", "fsdp2 x2"])
def test_bfloat16_sends_as_many_numbers_in_half_the_bytes(layout: str) -> None:
    sent = _sent(layout, wire_dtype="bfloat16")
    assert _for(sent, "sketches") == SKETCHES[layout]
    assert all(p.bytes == 2 * p.elements for p in sent if p.purpose == "sketches")


@pytest.mark.parametrize("layout", ["ddp x2", "fsdp2 x2"])
def test_dense_gradients_of_the_same_model_travel_whole(layout: str) -> None:
    sent = _sent(layout, ratio=None)
    assert not _for(sent, "sketches")
    assert _elements(sent, "gradients") == MATRICES * WIDTH * INNER + VECTORS


@pytest.mark.deepspeed
def test_zero_2_sends_fifty_times_fewer_gradients_over_four_micro_batches() -> None:
    # It reduces every micro-batch; 1-D parameters, here 0.2 % of all, remain on that way.
    model = ("stack", (("layers", 1), ("width", 512), ("inner", 2048)))
    dense = Setup(layout="zero-2", model=model, micro_batches=4)
    totals = []
    for setup in (dense, replace(dense, ratio=16)):
        sent = launched_pool_of(2)(payloads, setup)[0]
        totals.append(_elements(sent, "gradients") + _elements(sent, "sketches"))
    assert totals[0] == 4 * (2 * 512 * 2048 + 3 * 512 + 2048)
    assert totals[0] / totals[1] >= 50


def _both_counters(setup: Setup) -> tuple[int, float]:
    training = start(setup)
    training.run(range(2))
    with Traffic() as traffic, Collectives() as collectives:
        training.run(range(2, 3))
    # On a ring a reduce-scatter costs one pass, with gloo two.
    ring = sum(p.cost / (2 if p.kind == "reduce_scatter" else 1) for p in collectives.sent)
    return traffic.bytes_sent, ring


@pytest.mark.parametrize("layout", ["ddp x2", "fsdp2 x3", "hsdp 2x2"])
def test_the_trainers_own_counter_finds_the_same(layout: str) -> None:
    setup = replace(SMALL, layout=layout.split()[0])
    for traffic, ring in pool_of(RANKS[layout])(_both_counters, setup):
        assert traffic == pytest.approx(ring, abs=100)  # it rounds each collective down


# ---- buckets


def _in_small_buckets(body: Any, *args: Any) -> Any:
    return _with(routes, "SMALLEST_BUCKET_BYTES", 1, body, *args)


_EITHER_WAY = ((payloads, ()), (_in_small_buckets, (payloads,)))


@pytest.mark.parametrize("layout", ["ddp x2", "hsdp 2x2"])
def test_eight_buckets_carry_what_one_does(layout: str) -> None:
    setup = replace(SMALL, layout=layout.split()[0])
    sent = pool_of(RANKS[layout])(_in_small_buckets, payloads, setup)[0]
    for kind, elements in SKETCHES[layout]:
        sizes = [size for its_kind, size in _for(sent, "sketches") if its_kind == kind]
        assert len(sizes) == routes.BUCKETS
        assert sum(sizes) == elements


@pytest.mark.parametrize("layout", ["ddp x2", "columns x2", "fsdp2 x4", "hsdp 2x2"])
def test_a_run_in_eight_buckets_is_the_run_in_one(layout: str) -> None:
    case = SketchedCase(settings={"momentum": "flora"}, micro_batches=3)
    pool = pool_of(layouts.LAYOUTS[layout][0])
    one, norms = pool(layouts.run, layout, case)[0]
    eight, norms_of_eight = pool(_in_small_buckets, layouts.run, layout, case)[0]
    # A bucket of gloo's is summed from another rank on than the whole: two numbers are added in
    # either order alike, more are not.
    tolerance = 0.0 if pool.world_size == 2 else EXACT
    for name, weight in one.items():
        torch.testing.assert_close(eight[name], weight, rtol=tolerance, atol=tolerance)
    assert norms_of_eight == pytest.approx(norms, rel=tolerance)


@pytest.mark.parametrize("layout", ["ddp x2", "fsdp2 x3"])
def test_records_in_eight_buckets_make_the_run_of_one_bit_for_bit(layout: str) -> None:
    case = SketchedCase(gradient_bits=4, micro_batches=2)
    pool = pool_of(layouts.LAYOUTS[layout][0])
    one, norms = pool(layouts.run, layout, case)[0]
    eight, norms_of_eight = pool(_in_small_buckets, layouts.run, layout, case)[0]
    assert norms_of_eight == norms
    for name, weight in one.items():
        assert eight[name].equal(weight), name


def test_records_travel_an_eighth_at_a_time() -> None:
    setup = replace(SMALL, layout="fsdp2", ratio=None, bits=4)
    sent, in_small = (pool_of(2)(run, *args, setup)[0] for run, args in _EITHER_WAY)
    (whole,), sizes = (
        [p.elements for p in each if p.kind == "all_to_all"] for each in (sent, in_small)
    )
    assert sum(sizes) == whole
    assert max(sizes) <= whole / routes.BUCKETS + 2 * (MATRICES + 1) + 2 * (3 * 20)


def _in_small_pieces(body: Any, *args: Any) -> Any:
    return _with(record_pieces, "_WORK_NUMBERS", 1, body, *args)


@pytest.mark.parametrize("layout", ["fsdp2 x3", "hsdp 2x2"])
def test_records_that_are_summed_line_by_line_are_those_summed_at_once(layout: str) -> None:
    case = SketchedCase(gradient_bits=4, wire_bits=1, micro_batches=3)
    pool = pool_of(layouts.LAYOUTS[layout][0])
    whole, _ = pool(layouts.run, layout, case)[0]
    pieces, _ = pool(_in_small_pieces, layouts.run, layout, case)[0]
    assert whole.keys() == pieces.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(pieces[name], weight, rtol=0.0, atol=0.0)


# ---- memory

DEEP, SIDE, RATIO = 32, 384, 8
FULL = 4 * DEEP * 2 * SIDE * SIDE
"""Bytes of the gradients of all matrices."""
UNIT = 4 * (2 * SIDE * SIDE + 4 * SIDE)
ALLOWED = 1.3 * (FULL / RATIO + UNIT)
MEMORY = Setup(
    layout="fsdp2, weights kept",
    model=("stack", (("layers", DEEP), ("width", SIDE), ("inner", SIDE))),
    ratio=RATIO,
    micro_batches=4,
)


@cache
def _peak_of(ratio: int | None) -> int:
    everyone = pool_of(2)(peak, replace(MEMORY, ratio=ratio))
    assert all(rank.largest_unit == UNIT for rank in everyone)
    return max(rank.gradients for rank in everyone)


def test_unsynchronised_micro_batches_hold_sketches_and_one_gradient() -> None:
    assert _peak_of(RATIO) <= ALLOWED


def test_fsdp2_itself_holds_all_gradients_whole() -> None:
    assert _peak_of(None) >= FULL


# ---- the tests notice


def _sending_each_time(setup: Setup) -> list[Payload]:
    original = Gradients.take

    def take(self: Gradients, flow: Any, gradient: Any) -> None:
        original(self, flow, gradient)
        dist.all_reduce(flow.accumulator.sums_ENKR.clone())

    return _with(Gradients, "take", take, payloads, setup)


def _in_one_bucket(setup: Setup) -> Peak:
    return _with(routes, "BUCKETS", 1, peak, setup)


def _keeping_accumulators(setup: Setup) -> Peak:
    return _with(routes._Buckets, "_drop_packed", lambda *_: None, peak, setup)


def _keeping_gradients(setup: Setup) -> Peak:
    original, kept = Gradients.take, []

    def take(self: Gradients, flow: Any, gradient: Any) -> None:
        original(self, flow, gradient)
        kept.append(gradient)

    return _with(Gradients, "take", take, peak, setup)


def _with(home: Any, name: str, other: Any, body: Any, *args: Any) -> Any:
    original = getattr(home, name)
    setattr(home, name, other)
    try:
        return body(*args)
    finally:
        setattr(home, name, original)


def test_a_sketch_that_travels_with_each_micro_batch_is_counted() -> None:
    sent = pool_of(2)(_sending_each_time, replace(SMALL, micro_batches=4))[0]
    each_time = LAYERS * (INNER + WIDTH) * PER_ROW
    assert _elements(sent, "gradients") == OWN["ddp x2"] + 4 * each_time


@pytest.mark.parametrize("fault", [_in_one_bucket, _keeping_accumulators, _keeping_gradients])
def test_memory_that_is_kept_too_long_is_seen(fault: Any) -> None:
    assert max(rank.gradients for rank in pool_of(2)(fault, MEMORY)) > ALLOWED
