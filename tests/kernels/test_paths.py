# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels step as torch's operators do, whatever the threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flora_dist import Flora
from flora_dist.core.state.settings import MOMENTA
from flora_dist.core.step.plan import Plan
from flora_dist.kernels import at_once, native, native_vector
from flora_dist.kernels.library import found
from flora_dist.kernels.presence import VARIABLE
from tests.kernels.mutations import MUTATIONS, ROOT, SOURCES
from tests.kernels.paths import Case, case_of, difference, path, run

FIXED = Case(
    seed=0,
    shapes=((70, 100), (24, 64), (24, 64), (20, 208), (3, 20, 32), (50,)),
    dtype=torch.float32,
    settings={
        "lr": 1e-2,
        "momentum": "blend",
        "clip": 0.05,  # reached by every rule: `flora` begins with a tenth of its input
        "weight_decay": 0.1,
        "kappa": 2,
        "state_dtype": "float32",
    },
)
TILES = {"momentum": "blend", "orthogonalise": 16}
RULES: dict[str, dict[str, Any]] = {
    **{rule: {"momentum": rule} for rule in MOMENTA if rule != "vectors"},
    "tiles": TILES,
    "relative": {"momentum": "blend", "scale_parameter": "relative", "lr": 0.1},
}
BOUNDS = [
    *({"momentum": rule, "growth": 1.01} for rule in ("ademamix", "flora", "flora_strict")),
    *({"momentum": "blend", "normalise": kind} for kind in ("rows", "columns")),
    {"momentum": "flora", "normalise": "columns", "growth": 1.01},
    TILES | {"growth": 1.01},
]
# Places of ``numbers_of``: what of a step goes wrong if one of them is.
NUMBERS = {
    "beta2": 0,
    "rate of the second moment": 1,
    "lr": 2,
    "decay": 3,
    "beta1": 5,
    "gain": 6,
    "clip": 7,
    "sign": 8,
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_build_has_kernels_here() -> None:
    assert found().name.startswith("native"), found().said


# The last two have sketched numbers that cancel to zero, by which `apollo` divides.
@pytest.mark.parametrize("seed", [*range(60), 1107, 1896])
def test_random_runs_are_the_same_by_kernels_and_by_torch(seed: int) -> None:
    assert not difference(case_of(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_fixed_run_is_the_same_by_kernels_and_by_torch(rule: str, dtype: torch.dtype) -> None:
    settings = FIXED.settings | RULES[rule]
    assert not difference(replace(FIXED, dtype=dtype, settings=settings))


@pytest.mark.parametrize("settings", BOUNDS, ids=str)
def test_growth_and_normalise_are_the_same_by_kernels_and_by_torch(
    settings: dict[str, Any],
) -> None:
    # Gradients of one size grow little; the first step's update, without momentum, is the largest.
    case = replace(FIXED, settings=FIXED.settings | settings)
    assert not difference(case)
    with path("native"):
        weight = torch.nn.Parameter(torch.zeros(8, 64))
        said = Flora([("w", weight)], **settings).report().summary()
    assert "torch's operators" not in said


@pytest.mark.parametrize("rule", RULES)
def test_a_step_in_one_call_has_the_bits_of_one_by_phases(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (*FIXED.shapes, (600, 512))  # of several tiles
    settings = FIXED.settings | RULES[rule] | {"scale_parameter": True}
    settings |= {"growth": 1.01} if rule in {"ademamix", "flora_strict"} else {}
    case = replace(FIXED, shapes=shapes, settings=settings)
    in_one_call = run(case, "native")[1]
    monkeypatch.setattr(Plan, "_find_at_once", lambda _: None)
    by_phases = run(case, "native")[1]
    assert [key for key in in_one_call if not torch.equal(in_one_call[key], by_phases[key])] == []


@pytest.mark.usefixtures("threads")
def test_a_matrix_that_threads_share_has_the_bits_of_one_that_they_do_not() -> None:
    # Of two threads' work the large one is too much for one of them; among others it is not.
    alone = replace(FIXED, shapes=((700, 512),))
    torch.set_num_threads(1)
    expected = run(alone, "native")[1]
    torch.set_num_threads(2)
    found_now = run(alone, "native")[1]
    assert [key for key in expected if not torch.equal(expected[key], found_now[key])] == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_kernels_still_finds_its_place(name: str) -> None:
    mutation = MUTATIONS[name]
    assert (ROOT / SOURCES / mutation.file).read_text().count(mutation.old) == 1


@pytest.mark.parametrize("number", NUMBERS)
def test_a_wrong_number_given_to_the_kernels_is_noticed(
    number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_wrong(number, monkeypatch)
    assert difference(FIXED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_allowed_to_ties_hides_no_wrong_rate(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_wrong("lr", monkeypatch)
    assert "numbers differ" in difference(replace(FIXED, dtype=dtype))


def give_wrong(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ``NUMBERS`` is a hundredth too small from here on."""
    for module in (native, native_vector, at_once):
        right = module.numbers_of

        def wrong(*given: object, right: object = right) -> list[float]:
            numbers = right(*given)  # type: ignore[operator]
            numbers[NUMBERS[number]] *= 0.99
            return list(numbers)

        monkeypatch.setattr(module, "numbers_of", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_the_number_of_threads(rule: str, dtype: torch.dtype) -> None:
    shapes = (*FIXED.shapes, (300, 512))
    settings = FIXED.settings | RULES[rule]
    case = Case(seed=1, shapes=shapes, dtype=dtype, settings=settings)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, "native")[1])
    for other in results[1:]:
        assert [key for key in other if not torch.equal(other[key], results[0][key])] == []


def test_the_path_may_be_chosen_and_the_report_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    monkeypatch.setenv(VARIABLE, "torch")
    assert Flora([("w", weight)]).report().summary().endswith("kernels: torch")
    monkeypatch.setenv(VARIABLE, "native")
    assert "kernels: native (" in Flora([("w", weight)]).report().summary()
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="FLORA_DIST_KERNELS must be torch, native or unset"):
        Flora([("w", weight)]).report()
