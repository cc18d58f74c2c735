# SPDX-License-Identifier: Apache-2.0
"""Ranks that differ are told apart, all of them and at the same call; equal ones never."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flora_dist.core.consistency import compare as consistency
from flora_dist.core.state.settings import KNOBS
from tests.battery import layouts
from tests.battery.oracle import STEPS, Case
from tests.conftest import pool_of
from tests.harness.covering import by_default
from tests.optimizer import consistency_runs as held

Plant = Callable[[held.HeldRun], None]


# ---- no false alarm


def _trained_with_checks(layout: str, case: Case) -> int:
    calls = []
    original = consistency.check

    def spy(*arguments: Any, **more: Any) -> None:
        calls.append(arguments)
        original(*arguments, **more)

    consistency.check = spy
    try:
        layouts.run(layout, case)
    finally:
        consistency.check = original
    return len(calls)


CASES = [
    Case(settings={"check_every": 1, "momentum": "flora_strict", "weight_decay": 0.1}),
    # weights and momentum rounded with random bits, which must be the same on all replicas
    Case(dtype=torch.bfloat16, settings={"check_every": 1, "state_dtype": "bfloat16"}),
]


def _axes(layout: str, case: Case) -> dict[str, Hashable]:
    place = layouts.place_of(layout)
    return place if place["ranks"] == 1 else {**place, "dtype": case.dtype}  # one compares nothing


@pytest.mark.parametrize(
    ("layout", "case"), by_default(product(layouts.LAYOUTS, CASES), _axes), ids=str
)
def test_ranks_of_every_layout_agree_after_every_step(layout: str, case: Case) -> None:
    world_size, _ = layouts.LAYOUTS[layout]
    attached = 1 if layout.startswith("fsdp1") else 0
    counts = pool_of(world_size)(_trained_with_checks, layout, case)
    assert counts == [STEPS + attached] * world_size


# ---- what is planted on one rank


def _change(knob: str, value: Any) -> Plant:
    def plant(run: held.HeldRun) -> None:
        run.optimizer.param_groups[0][knob] = value

    return plant


def _later_step(run: held.HeldRun) -> None:
    run.states()["whole"]["step"] += 1


def _later_window(run: held.HeldRun) -> None:
    run.states()["whole"]["window"] += 1


def _no_state(run: held.HeldRun) -> None:
    run.states()["whole"].clear()


def _frozen(run: held.HeldRun) -> None:
    run.optimizer.param_groups[0]["params"][0].requires_grad_(requires_grad=False)


def _level(run: held.HeldRun) -> None:
    run.optimizer.roster.set_level("compressed")


PLANTS: dict[str, tuple[str, Plant, list[str]]] = {
    "rate": ("settings", _change("lr", 2e-2), ["lr of", "(group 0)", "0.02 on", "0.01 on"]),
    "rate as a tensor": ("settings", _change("lr", torch.tensor(0.5)), ["lr of", "0.5 on"]),
    "setting": ("settings", _change("kappa", 4), ["kappa of", "4 on", "3 on", "schedulers"]),
    "seed": ("seed", _change("seed", 7), ["seed of", "7 on", "0 on", "Pass the same seed"]),
    "step": ("steps", _later_step, ["step of 'whole'", "5 on", "4 on", "same checkpoint"]),
    "window": ("steps", _later_window, ["window of 'whole'", "2 on", "1 on"]),
    "no state": ("steps", _no_state, ["step of 'whole'", "absent on", "4 on"]),
    "frozen": ("names", _frozen, ["requires_grad of", "False on", "True on", "same model"]),
    "level": ("level", _level, ["gradients is 'compressed' on", "'dense' on", "Attach"]),
}
"""Name -> (field, what to do on one rank after four steps, what the error must say)."""


def _planted(layout: str, plant: str, rank: int, mutation: str = "") -> str:
    run = held.RUNS[layout]()
    run.train(range(4))
    assert held.refusal(run) == ""
    if dist.get_rank() == rank:
        PLANTS[plant][1](run)
    with held.without(mutation):
        return held.refusal(run)


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize(("layout", "world_size"), [("whole", 2), ("rows", 3), ("spans", 3)])
def test_one_rank_that_differs_is_named_on_every_rank(
    layout: str, world_size: int, plant: str
) -> None:
    field, _, words = PLANTS[plant]
    if layout == "spans" and plant == "frozen":
        words = ["requires_grad of", "False on rank 1 and True on ranks 0, 2"]
    said = pool_of(world_size)(_planted, layout, plant, 1)
    assert len(set(said)) == 1
    alike = "rank 0" if world_size == 2 else "ranks 0, 2"
    for word in [f"the same {field}; ", "on rank 1 and", f"on {alike}", *words]:
        assert word in said[0], (word, said[0])


@pytest.mark.parametrize("plant", ["setting", "seed", "window", "frozen", "level"])
def test_each_field_is_what_finds_its_difference(plant: str) -> None:
    assert set(pool_of(2)(_planted, "whole", plant, 1, PLANTS[plant][0])) == {""}


def test_without_messages_nothing_is_found() -> None:
    assert set(pool_of(2)(_planted, "whole", "setting", 1, "messages")) == {""}


def test_two_ranks_that_differ_are_measured_by_rank_0() -> None:
    assert "0.01 on rank 1 and 0.02 on rank 0" in pool_of(2)(_planted, "whole", "rate", 0)[0]


def _every_setting() -> dict[str, str]:
    other: dict[str, Any] = {
        "rank": 1,
        "block": 16,
        "sketch": "gaussian",
        "momentum": "blend",
        "blend_gain": 1.5,
        "growth": 1.5,
        "normalise": "rows",
        "orthogonalise": 4,
        "compress": "authors",
        "beta1": 0.8,
        "kappa": 9,
        "transfer": "reset",
        "beta2": 0.99,
        "eps": 1e-20,
        "clip": None,
        "scale_parameter": True,
        "state_dtype": "bfloat16",
        "state_bits": 8,
        "stochastic_rounding": False,
        "skip_nonfinite": True,
        "strict": True,
        "seed": -1,
        "lr": 0.5,
        "weight_decay": 0.5,
        "maximize": True,
    }
    assert set(other) == {*KNOBS, "lr", "weight_decay", "maximize"}
    run = held.whole()
    run.train(range(2))
    group, said = run.optimizer.param_groups[0], {}
    for knob, value in other.items():
        before = group[knob]
        if dist.get_rank() == 1:
            group[knob] = value
        said[knob] = held.refusal(run)
        group[knob] = before
        assert held.refusal(run) == "", knob
    return said


def test_every_setting_of_a_group_is_compared() -> None:
    # Also those that do not fit the state any more: a rank that raised alone would leave the others
    # waiting.
    ours, theirs = pool_of(2)(_every_setting)
    assert ours == theirs
    for knob, text in ours.items():
        assert f"{knob} of 'bias'" in text, text
