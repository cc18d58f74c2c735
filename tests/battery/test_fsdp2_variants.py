# SPDX-License-Identifier: Apache-2.0
"""FSDP2, HSDP and DDP as they are really used, against the reference.

The tolerances are those of ``test_layouts.py``, argued there.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from flora_dist import Flora
from tests.battery import layouts, special_runs, variants, zoo
from tests.battery.oracle import STEPS, Case, distances, reference_run
from tests.battery.test_layouts import EXACT, FLOAT_MODEL, FLOAT_PARAMETER
from tests.battery.variants import Gradients, Weights
from tests.conftest import pool_of

# Every kind of sum at once: clip, scale, and weight decay on the way.
CASE = Case(settings={"momentum": "flora", "scale_parameter": True, "weight_decay": 0.1})


@cache
def _expected() -> tuple[Weights, Weights]:
    return reference_run(CASE)


# A variant changes when shards are gathered, moved or named, not where they are cut, which hangs on
# the number of ranks: each runs on one number by default, every second one on three.
RUNS = [
    pytest.param(name, world_size, marks=[pytest.mark.slow] * ((number + world_size) % 2))
    for number, name in enumerate(variants.VARIANTS)
    for world_size in (2, 3)
]


@pytest.mark.parametrize(("variant", "world_size"), RUNS)
def test_a_variant_equals_the_reference(variant: str, world_size: int) -> None:
    everyone = pool_of(world_size)(variants.run, variant, CASE)
    for weights in everyone:
        assert distances(*_expected(), weights)[1] < EXACT


@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_freeze_and_thaw_under_fsdp2(world_size: int) -> None:
    def without_frozen(step: int, gradients: Gradients) -> Gradients:
        frozen = {name for name, steps in special_runs.FROZEN_AT.items() if step in steps}
        return {name: None if name in frozen else g for name, g in gradients.items()}

    expected = variants.follow(CASE, zoo.build(CASE.dtype), change=without_frozen)
    weights, counts = pool_of(world_size)(special_runs.thaw, CASE)[0]
    assert distances(*expected, weights)[1] < EXACT
    assert counts == {n: STEPS - len(steps) for n, steps in special_runs.FROZEN_AT.items()}


@pytest.mark.parametrize(
    ("world_size", "shape", "dim", "local_shapes"),
    [
        (2, (3, 6, 13), 1, [(3, 3, 13)] * 2),
        (3, (3, 6, 13), 1, [(3, 2, 13)] * 3),
        (3, (2, 5, 13), 0, [(1, 5, 13), (1, 5, 13), (0, 5, 13)]),
        (3, (4, 5, 13), 0, [(2, 5, 13), (2, 5, 13), (0, 5, 13)]),
    ],
    ids=["rows of 2 ranks", "rows of 3 ranks", "fewer experts than ranks", "an idle last rank"],
)
@pytest.mark.parametrize("momentum", ["flora", "flora_strict"])
def test_experts_sharded_by_row_or_by_matrix_equal_the_reference(
    world_size: int,
    shape: tuple[int, int, int],
    dim: int,
    local_shapes: list[tuple[int, ...]],
    momentum: str,
) -> None:
    case = Case(settings={"momentum": momentum, "scale_parameter": True})
    expected = variants.follow(case, special_runs.with_experts(case.dtype, shape))
    everyone = pool_of(world_size)(special_runs.train_experts, case, shape, dim)
    assert [local for _, local in everyone] == local_shapes
    assert distances(*expected, everyone[0][0])[1] < EXACT


def test_a_kernel_sharded_by_channels_is_refused_and_nothing_changes() -> None:
    for message, changed, kept in pool_of(2)(special_runs.refuse_channels, CASE):
        assert "'conv.weight'" in message
        assert "(6, 2, 3)" in message
        assert "dim 0" in message
        assert not changed
        assert kept == 0


def test_fp32_weights_under_bf16_compute_follow_the_reduced_gradients() -> None:
    case = Case(dtype=torch.float32)
    for whole, worst in pool_of(2)(special_runs.mixed_precision, case):
        assert whole < FLOAT_MODEL
        assert worst < FLOAT_PARAMETER


@pytest.mark.parametrize("dim", [0, 1], ids=["whole experts", "rows of experts"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_bf16_weights_and_momentum_equal_a_plain_run_bit_for_bit(world_size: int, dim: int) -> None:
    # Gradients are small whole numbers and nothing is clipped: the sums over ranks are exact in
    # any order, and all the rest is one row's own arithmetic.
    settings = {"state_dtype": "bfloat16", "clip": None, "momentum": "flora"}
    case = Case(dtype=torch.bfloat16, settings=settings)
    assert pool_of(world_size)(special_runs.low_precision, case, dim) == [[]] * world_size


def test_hsdp_replicas_stay_identical_and_state_is_placed_like_its_parameter() -> None:
    everyone = pool_of(4)(special_runs.replicas, CASE)
    for rank in (0, 1):  # ranks 2 and 3 hold the same shards
        ours, theirs = everyone[rank][0], everyone[rank + 2][0]
        assert ours["up.weight.step"] == STEPS
        assert variants.differing(ours, theirs) == []
    by_rows = "(Replicate(), Shard(dim=0))"
    wanted = {
        "up.weight.momentum": (by_rows, (37, 3, 2)),
        "up.weight.row": (by_rows, (37,)),
        "up.weight.column": ("(Replicate(), Replicate())", (20,)),
        "experts.momentum": (by_rows, (3, 5, 2, 2)),
        "experts.row": (by_rows, (3, 5)),
        "experts.column": (by_rows, (3, 13)),
        "conv.weight.momentum": (by_rows, (6, 2, 1)),
        "narrow.weight.momentum": (by_rows, (9, 3)),
        "single.weight.row": (by_rows, (1,)),
        "single.bias.second": (by_rows, (1,)),
        "norm.weight.momentum": (by_rows, (20,)),
    }
    for _, kinds in everyone:
        assert {name: kinds[name] for name in wanted} == wanted


def test_ddp_ranks_hold_the_same_bits() -> None:
    ours, theirs = pool_of(2)(special_runs.ddp_state, CASE)
    assert ours["up.weight.step"] == STEPS
    assert variants.differing(ours, theirs) == []


def test_the_same_seed_gives_the_same_run_on_two_and_on_four_ranks() -> None:
    runs = [pool_of(n)(layouts.run, f"fsdp2 x{n}", CASE)[0] for n in (2, 4)]
    start, _ = _expected()
    assert distances(start, *runs)[1] < EXACT


def test_another_seed_gives_another_run() -> None:
    other = Case(settings={**CASE.settings, "seed": 1})
    got = pool_of(2)(layouts.run, "fsdp2 x2", other)[0]
    assert distances(*_expected(), got)[1] > 1e6 * EXACT


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("momentum", ["flora", "none"])
def test_the_report_counts_the_bytes_on_every_rank_exactly(world_size: int, momentum: str) -> None:
    case = Case(dtype=torch.bfloat16, settings={"momentum": momentum, "state_dtype": "bfloat16"})
    everyone = pool_of(world_size)(special_runs.count_bytes, case)
    for reported, measured, _ in everyone:
        assert reported == measured
    # All ranks together keep what one process keeps, and more copies of the column means of 2-D
    # matrices; those of experts go with their matrices.
    optimizer = Flora(zoo.build(case.dtype).named_parameters(), **case.flora)
    sizes = everyone[0][2].items()
    columns = sum(size for n, size in sizes if n.endswith(".column") and n != "experts.column")
    total = optimizer.report().state_bytes + (world_size - 1) * columns
    assert sum(reported for reported, _, _ in everyone) == total
