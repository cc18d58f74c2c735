# SPDX-License-Identifier: Apache-2.0
"""The planner against real runs on two ranks: every category within 5 % of the measured bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from flora_dist.cluster.planner import activations, memory, wire
from flora_dist.cluster.planner.model import Parameter
from tests.planner import compared
from tests.planner.compared import RANKS, differences, planned
from tests.planner.runs import Case

pytestmark = pytest.mark.deepspeed

DENSE_FSDP2 = Case(model="llama_9m", backend="fsdp2", ratio=16, accumulate=2)
SKETCHED_FSDP2 = Case(model="llama_9m", backend="fsdp2", ratio=8, gradients="compressed")
DENSE_ZERO2 = Case(model="llama_9m", backend="zero2", ratio=8, accumulate=2)
SKETCHED_ZERO2 = Case(model="llama_9m", backend="zero2", ratio=16, gradients="compressed")
SHARDED = replace(SKETCHED_FSDP2, gradients="sharded", accumulate=2)
FEW_BITS_FSDP2 = replace(SKETCHED_FSDP2, gradient_bits=4)
FEW_BITS_ZERO2 = replace(SKETCHED_ZERO2, gradient_bits=4)
UNEVEN = Case(model="llama_tiny", backend="fsdp2", ratio=8)
"""257 rows of embeddings on two ranks."""
ALONE_ZERO2 = Case(
    model="llama_9m",
    backend="zero2",
    ratio=16,
    gradients="compressed",
    accumulate=2,
    precision="bfloat16-pure",
)
ALONE_FSDP2 = replace(ALONE_ZERO2, backend="fsdp2", gradients="dense")
QUICK = (
    *(DENSE_FSDP2, SKETCHED_FSDP2, DENSE_ZERO2, SKETCHED_ZERO2, UNEVEN),
    *(ALONE_ZERO2, ALONE_FSDP2, SHARDED, FEW_BITS_FSDP2, FEW_BITS_ZERO2),
)
ALL = [
    Case(model=model, backend=backend, ratio=ratio, gradients=level)
    for model in ("llama_9m", "llama_60m")
    for backend in ("fsdp2", "zero2")
    for level in ("dense", "compressed")
    for ratio in (8, 16)
]


measured = lru_cache(compared.measured)
"""Each run is made once."""


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_every_category_is_within_five_percent_of_a_real_run(case: Case) -> None:
    assert differences(planned(case), measured(case)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_so_it_is_on_llama_9m_and_60m_at_both_ratios(case: Case) -> None:
    assert differences(planned(case), measured(case)) == []


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_weights_state_and_accumulators_are_exact_to_the_byte(case: Case) -> None:
    plan, run = planned(case), measured(case)
    exact = ("weights", "state", "accumulators")
    assert {name: plan[name] for name in exact} == {name: run[name] for name in exact}


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_total_is_no_less_than_the_peak_of_a_step(case: Case) -> None:
    run = measured(case)
    peak = run["weights"] + run["state"] + max(run["in_backward"], run["in_step"])
    assert planned(case)["total"] >= peak


# ---- planted mistakes


def forget_the_embedding(patch: pytest.MonkeyPatch) -> None:
    shards = memory.shards_by_rank

    def without(parameters: tuple[Parameter, ...], *more: Any) -> Any:
        return shards(tuple(p for p in parameters if p.kind != "embedding"), *more)

    patch.setattr(memory, "shards_by_rank", without)


def round_shards_down(patch: pytest.MonkeyPatch) -> None:
    shards = memory.shards_by_rank

    def rounded(*arguments: Any) -> Any:
        return [
            [replace(s, stored=s.parameter.numel // RANKS) for s in rank]
            for rank in shards(*arguments)
        ]

    patch.setattr(memory, "shards_by_rank", rounded)


def leave_the_line_uncut(patch: pytest.MonkeyPatch) -> None:
    shards = memory.shards_by_rank
    patch.setattr(
        memory, "shards_by_rank", lambda parameters, sharding, _: shards(parameters, sharding, 1)
    )


def forget_masters(patch: pytest.MonkeyPatch) -> None:
    line = memory._line_weights
    patch.setattr(
        memory,
        "_line_weights",
        lambda *a: replace(line(*a), total=line(*a).total * RANKS // (RANKS + 1)),
    )


def think_that_deepspeed_makes_zeros(patch: pytest.MonkeyPatch) -> None:
    whole = memory._whole_bytes
    patch.setattr(
        memory,
        "_whole_bytes",
        lambda element, _, shard: whole(element, frozenset({shard.parameter.name}), shard),
    )


def think_that_there_are_masters(patch: pytest.MonkeyPatch) -> None:
    line = memory._line_weights
    patch.setattr(
        memory,
        "_line_weights",
        lambda request, method, ranks: line(request, replace(method, precision="bfloat16"), ranks),
    )


def cut_sketches_before_they_are_sent(patch: pytest.MonkeyPatch) -> None:
    shards = memory._accumulators
    patch.setattr(
        memory,
        "_accumulators",
        lambda request, method: shards(request, replace(method, level="sharded")),
    )


def forget_the_logits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(activations, "_rest", lambda *_: 0)


def think_that_norms_hold_the_reduced_buffer(patch: pytest.MonkeyPatch) -> None:
    method = memory.Method.sketch_of
    patch.setattr(
        memory.Method,
        "sketch_of",
        lambda self, p: None if self.level == "sharded" else method(self, p),
    )


def gather_once_per_step(patch: pytest.MonkeyPatch) -> None:
    weights = wire._of_weights
    patch.setattr(
        wire, "_of_weights", lambda request, method: weights(replace(request, accumulate=1), method)
    )


def reduce_scatter_where_deepspeed_all_reduces(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(wire.RING_PASSES, "all_reduce", 1)  # type: ignore[arg-type]


MISTAKES: list[tuple[Callable[[pytest.MonkeyPatch], None], Case, str]] = [
    (forget_the_embedding, DENSE_ZERO2, "gradients"),
    (forget_the_embedding, SKETCHED_FSDP2, "weights"),
    (leave_the_line_uncut, DENSE_ZERO2, "state"),
    (forget_masters, DENSE_ZERO2, "weights"),
    (think_that_deepspeed_makes_zeros, SKETCHED_ZERO2, "gradients"),
    (think_that_there_are_masters, ALONE_ZERO2, "weights"),
    (cut_sketches_before_they_are_sent, SKETCHED_FSDP2, "accumulators"),
    (forget_the_logits, DENSE_FSDP2, "activations"),
    (gather_once_per_step, DENSE_FSDP2, "wire"),
    (think_that_norms_hold_the_reduced_buffer, SHARDED, "gradients"),
    (reduce_scatter_where_deepspeed_all_reduces, DENSE_ZERO2, "wire"),
]


@pytest.mark.parametrize(("mistake", "case", "category"), MISTAKES)
def test_a_planted_mistake_is_noticed_in_its_category(
    mistake: Callable[[pytest.MonkeyPatch], None],
    case: Case,
    category: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = measured(case)
    mistake(monkeypatch)
    found = differences(planned(case), run)
    assert any(each.startswith(category) for each in found), found


def test_shards_rounded_down_are_noticed_where_bytes_must_be_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = measured(UNEVEN)
    round_shards_down(monkeypatch)
    assert planned(UNEVEN)["weights"] != run["weights"]
