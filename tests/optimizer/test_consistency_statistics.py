# SPDX-License-Identifier: Apache-2.0
"""State that must be equal bit for bit, on every layout: a drift on one rank is found and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.consistency.fingerprints import fingerprints
from tests.conftest import pool_of
from tests.optimizer import consistency_runs as held
from tests.optimizer import runs

Plant = Callable[[held.HeldRun], None]


# ---- statistics

# What must be equal on all ranks, and on which of them a bit is flipped.
STATISTICS = [
    ("whole", 2, 1, "whole", "column"),
    ("whole", 2, 1, "whole", "row"),
    ("whole", 2, 1, "whole", "momentum"),
    ("whole", 2, 1, "narrow", "momentum"),
    ("whole", 2, 1, "bias", "second"),
    ("whole", 2, 1, "bias", "weight"),
    ("whole", 3, 2, "experts", "momentum"),
    ("rows", 2, 1, "whole", "column"),
    ("rows", 3, 2, "conv", "column"),
    ("columns", 2, 1, "wide", "column"),
    ("columns", 2, 0, "bias", "second"),
    ("spans", 2, 1, "whole", "column"),
    ("spans", 3, 1, "whole", "column"),
    ("spans", 3, 2, "experts", "column"),
    ("rows of replicas", 4, 2, "whole", "column"),
    ("rows of replicas", 4, 3, "whole", "momentum"),
    ("rows of replicas", 4, 1, "wide", "row"),
    ("rows of replicas", 4, 0, "bias", "weight"),
]


def _weight_of(run: held.HeldRun, name: str) -> Tensor:
    group = run.optimizer.param_groups[0]
    return dict(zip(group["param_names"], group["params"], strict=True))[name]


MOST_TURNS = 16
"""Shards and matrices take turns, by the step; so many steps come to each of these here."""


def _drifted(layout: str, rank: int, name: str, entry: str, turns: int, mutation: str = "") -> str:
    """What is said at the first of the steps to come that looks there; empty if none does."""
    run = held.RUNS[layout]()
    run.train(range(4))
    tensor = _weight_of(run, name) if entry == "weight" else run.states()[name].get(entry)
    is_here = dist.get_rank() == rank and tensor is not None and held.local(tensor).numel() > 0
    if is_here:
        held.flip(tensor, place=0)
    for turn in range(turns):
        for state in run.states().values():  # another turn; the flipped bit stays
            state["step"] = 4 + turn
        with held.without(mutation):
            if said := held.refusal(run):
                return said
    return ""


@pytest.mark.parametrize(("layout", "world_size", "rank", "name", "entry"), STATISTICS)
def test_one_flipped_bit_of_what_ranks_share_is_found(
    layout: str, world_size: int, rank: int, name: str, entry: str
) -> None:
    said = set(pool_of(world_size)(_drifted, layout, rank, name, entry, MOST_TURNS))
    assert len(said) == 1  # every rank raises, with the same words
    (text,) = said
    assert f"the same statistics; {entry}" in text
    assert f"of {name!r}" in text
    if world_size == 3:  # of two that hold it the first is right, whoever was changed
        assert f"on rank {rank} is another than" in text


@pytest.mark.parametrize(
    ("entry", "mutation"), [("column", "_column"), ("momentum", "_piece"), ("weight", "_piece")]
)
def test_each_sample_is_what_finds_its_drift(entry: str, mutation: str) -> None:
    assert set(pool_of(2)(_drifted, "whole", 1, "whole", entry, 2, mutation)) == {""}


def _own_shards_differ() -> str:
    run = held.rows()
    run.train(range(4))
    held.flip(run.states()["whole"]["momentum"], place=0, bit=3 + dist.get_rank())
    return held.refusal(run)


def test_what_each_rank_has_alone_is_not_compared() -> None:
    assert set(pool_of(3)(_own_shards_differ)) == {""}


def _not_a_number() -> tuple[str, str]:
    run = held.whole()
    run.train(range(2))
    momentum = run.states()["whole"]["momentum"]
    momentum.view(-1)[5] = torch.nan
    alike = held.refusal(run)
    if dist.get_rank() == 1:
        held.flip(momentum, place=5)
    return alike, held.refusal(run)


def test_equal_nan_is_equal_and_other_bits_of_nan_are_not() -> None:
    for alike, unlike in pool_of(2)(_not_a_number):
        assert alike == ""
        assert "momentum of 'whole'" in unlike


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_every_bit_of_an_element_is_in_the_fingerprint(dtype: torch.dtype) -> None:
    values = runs.draw("bits", 0, (40,), dtype)
    before = int(fingerprints([{"x": values}]))
    seen = {before}
    for bit in range(8 * values.element_size()):
        for place in (0, 17, 39):
            flipped = values.clone()
            integers = flipped.view(
                {2: torch.int16, 4: torch.int32, 8: torch.int64}[flipped.itemsize]
            )
            integers[place] ^= -(1 << bit) if bit == 8 * flipped.itemsize - 1 else 1 << bit
            seen.add(int(fingerprints([{"x": flipped}])))
    assert len(seen) == 1 + 3 * 8 * values.element_size()
    swapped = values.flip(0)
    assert int(fingerprints([{"x": swapped}])) not in seen
    assert all(0 <= number < 2**62 for number in seen)
    assert int(fingerprints([{"x": values.clone()}])) == before


def test_small_drifts_of_all_elements_do_not_cancel() -> None:
    # One unit in the last place here and there, as rounding leaves it: a sum with constants that
    # grow evenly would lose 1, -1, -1, 1.
    values = runs.draw("drift", 0, (4096,), torch.float32)
    seen = {int(fingerprints([{"x": values}]))}
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        drift = torch.randint(-1, 2, (4096,), generator=generator, dtype=torch.int32)
        drifted = (values.view(torch.int32) + drift).view(torch.float32)
        seen.add(int(fingerprints([{"x": drifted}])))
    for start in range(0, 400, 4):
        drifted = values.clone()
        drifted.view(torch.int32)[start : start + 4] += torch.tensor([1, -1, -1, 1])
        seen.add(int(fingerprints([{"x": drifted}])))
    assert len(seen) == 601
