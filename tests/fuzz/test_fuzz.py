# SPDX-License-Identifier: Apache-2.0
"""A slice of the fuzz by default, what it is made of, and faults that it must notice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flora_dist.core.comm.groups import GroupReducer, MeshReducer
from flora_dist.core.parameters import loading
from flora_dist.core.state.settings import MOMENTA, SKETCHES, TRANSFERS
from flora_dist.core.step import phases
from tests.conftest import pool_of
from tests.fuzz import optimizer
from tests.fuzz.cases import PRECISIONS, ROUND_TRIPS, SHARDED, WORLD_SIZE, Case, deal
from tests.fuzz.running import run, run_all

SEED = 7


def _cases(count: int, ranks: int = 1) -> list[Case]:
    return [deal(SEED, number, ranks=ranks) for number in range(count)]


def test_forty_cases_on_one_process_are_the_reference() -> None:
    assert list(optimizer.broken_of(_cases(40), None)) == []


def test_six_cases_on_two_ranks_are_the_reference() -> None:
    cases = _cases(6, ranks=WORLD_SIZE)
    assert {case.layout for case in cases} == set(SHARDED)
    assert list(optimizer.broken_of(cases, pool_of(WORLD_SIZE))) == []


def test_the_cases_meet_every_choice_and_are_dealt_alike_every_time() -> None:
    cases = _cases(200)
    assert repr(cases) == repr(_cases(200))  # NaN is not equal to itself
    settings = [group.settings for case in cases for group in case.groups]
    for key, values in (("momentum", MOMENTA), ("sketch", SKETCHES), ("transfer", TRANSFERS)):
        assert {each[key] for each in settings} == set(values)
    moments = [moment for case in cases for moment in case.moments]
    assert {moment.round_trip for moment in moments} == {"", *ROUND_TRIPS}
    assert any(moment.poison for moment in moments)
    assert any(moment.missing for moment in moments)
    assert any(moment.frozen for moment in moments)
    assert any(0.0 in moment.rates for moment in moments)
    parameters = [parameter for case in cases for parameter in case.parameters]
    assert {len(parameter.shape) for parameter in parameters} == set(range(6))
    assert {parameter.dtype for parameter in parameters} == set(PRECISIONS)
    assert any(group.joins for case in cases for group in case.groups)
    on_ranks = [m for case in _cases(60, WORLD_SIZE) for m in case.moments]
    assert {ranks for m in on_ranks for ranks in m.missing.values()} == {(0, 1), (0,), (1,)}


def _rate_of_the_next_step(original: Any) -> Callable[..., float]:
    return lambda step, beta2: float(original(step + 1, beta2))


def _as_torch_loads(original: Any) -> Callable[..., Any]:
    def copy_in(value: Any, tensor: torch.Tensor) -> Any:
        copied = original(value, tensor)
        return copied.to(tensor.dtype) if isinstance(copied, torch.Tensor) else copied

    return copy_in


def _first_window_for_ever(original: Any) -> Callable[..., Any]:
    def moment(*given: Any) -> Any:
        made = original(*given)
        object.__setattr__(made, "window", 0)
        return made

    return moment


@pytest.mark.parametrize(
    ("home", "attribute", "mutate"),
    [
        (phases, "beta2_at", _rate_of_the_next_step),
        (loading, "copy_in", _as_torch_loads),
        (phases, "moment_of", _first_window_for_ever),
    ],
)
def test_the_fuzz_notices_a_broken_mechanism(
    home: Any, attribute: str, mutate: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, attribute, mutate(getattr(home, attribute)))
    assert any(run(case) for case in _cases(40))


def _without_sums(cases: list[Case]) -> list[list[str]]:
    """Each rank keeps the sums of its own part."""
    kept = [(kind, kind.sum_) for kind in (MeshReducer, GroupReducer)]
    for kind, _ in kept:
        kind.sum_ = lambda self, message_S: None  # noqa: ARG005 - the method's signature
    try:
        return run_all(cases)
    finally:
        for kind, original in kept:
            kind.sum_ = original


def test_the_fuzz_notices_on_every_sharded_layout_that_nothing_is_summed() -> None:
    cases = _cases(6, ranks=WORLD_SIZE)
    broken = {
        case.layout
        for answers in pool_of(WORLD_SIZE)(_without_sums, cases)
        for case, wrong in zip(cases, answers, strict=True)
        if wrong
    }
    assert broken == set(SHARDED)


def test_the_command_prints_a_broken_case_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "--cases", "3", "--seed", str(SEED)])
    for is_broken, code in ((False, 0), (True, 1)):
        if is_broken:
            wrong = _rate_of_the_next_step(phases.beta2_at)
            monkeypatch.setattr(phases, "beta2_at", wrong)
        with pytest.raises(SystemExit) as ended:
            optimizer.main()
        assert ended.value.code == code
        assert ("BROKEN 7/1/1" in capsys.readouterr().out) is is_broken
