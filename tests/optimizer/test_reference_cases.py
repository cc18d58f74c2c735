# SPDX-License-Identifier: Apache-2.0
"""Random shapes under random settings, in float64, against ``reference.py``.

Every momentum rule with every sketch and every transfer that goes with it, twice; blocks, decays,
clipping and the rest are dealt from shuffled decks, so that each value comes up equally often.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_dist import Flora
from flora_dist.core.state.settings import (
    MOMENTA,
    PROJECTED,
    SKETCHES,
    TRANSFERS,
    TWO_MOMENTS,
)
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs

STEPS = 7  # at kappa 5 one change of window, at 1 one per step
TOLERANCE = 1e-11  # the project's bound for float64: distance over movement

_DECKS: dict[str, list[Any]] = {
    "block": [2, 4, 8, 16, 32, 64, "full"],
    "beta2": [None, 0.0, 0.9, 0.999],
    "clip": [None, 0.05, 0.3, 1.0, 10.0],
    "growth": [None, None, 1.0, 1.01, 2.0],
    "orthogonalise": [None, None, None, 4, 64],
    "normalise": ["factored", "factored", "rows", "columns"],
    "scale_parameter": [False, True, "relative"],
    "weight_decay": [0.0, 0.1],
    "kappa": [1, 2, 3, 5],
    "maximize": [False, True],
    "beta1": [0.0, 0.5, 0.9, 0.99],
    "blend_gain": [None, 0.0, 1.0, 4.0],
    "eps": [1e-37, 1e-30, 1e-3],
    "seed": [0, 1, -(2**63), 2**63 - 1],
    "lr": [1e-4, 1e-2, 1.0],
}


def _rules() -> Iterator[dict[str, str]]:
    for momentum, sketch, transfer in itertools.product(MOMENTA, SKETCHES, TRANSFERS):
        is_projected = momentum in PROJECTED
        if momentum == "vectors" and (sketch, transfer) != ("hadamard", "shrink"):
            continue  # it sketches nothing
        if not is_projected or (sketch == "hadamard" and transfer != "paper"):
            yield {"momentum": momentum, "sketch": sketch, "transfer": transfer}


def _dealt(values: list[Any], count: int, dealer: random.Random) -> list[Any]:
    """``count`` values, each of them equally often, shuffled."""
    deck = list(itertools.islice(itertools.cycle(values), count))
    dealer.shuffle(deck)
    return deck


def _shapes(settings: dict[str, Any], dealer: random.Random) -> dict[str, tuple[int, ...]]:
    def size(largest: int) -> int:
        return dealer.randint(1, largest)

    if settings["block"] == "full" and settings["sketch"] == "hadamard":
        sides = [4, 8, 16]  # whole rows of a hadamard sketch: powers of two
        rows, columns = dealer.choice(sides), dealer.choice(sides)
        return {"matrix": (rows, columns), "experts": (size(3), columns, 16), "vector": (size(9),)}
    return {
        "matrix": (size(20), size(70)),
        "wide": (size(5), 40 + size(100)),
        "experts": (size(4), size(6), size(40)),
        "conv": (size(8), size(4), size(3), size(3)),
        "vector": (size(30),),
    }


def _cases() -> list[tuple[dict[str, Any], dict[str, tuple[int, ...]]]]:
    dealer = random.Random(2402_03293)
    rules = [*_rules(), *_rules()]
    decks = {name: _dealt(values, len(rules), dealer) for name, values in _DECKS.items()}
    cases = []
    for index, rule in enumerate(rules):
        settings = {
            "state_dtype": "float32",
            **rule,
            **{name: deck[index] for name, deck in decks.items()},
        }
        if rule["momentum"] in TWO_MOMENTS:  # these divide by second moments of their own
            settings["normalise"] = "factored"
        block = settings["block"]
        settings["rank"] = dealer.randint(1, 3 if block == "full" else min(int(block) - 1, 4))
        cases.append((settings, _shapes(settings, dealer)))
    return cases


def _label(case: object) -> str:
    assert isinstance(case, dict)
    keys = ("momentum", "sketch", "transfer", "block", "kappa")
    return "-".join(str(case[key]) for key in keys) if "momentum" in case else ""


@pytest.mark.filterwarnings("ignore:transfer='paper'")
@pytest.mark.parametrize(("settings", "shapes"), _cases(), ids=_label)
def test_any_settings_on_any_shapes_are_the_reference(
    settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    parameters = runs.build(shapes)
    start = runs.values(parameters)
    optimizer = Flora(parameters.items(), **settings)
    reference = reference_of(Case(settings=settings), start)
    for step in range(STEPS):
        runs.set_gradients(parameters, step)
        reference.step({name: p.grad for name, p in parameters.items()})
        optimizer.step()
    assert distances(start, dict(reference.weights), runs.values(parameters))[1] < TOLERANCE
    for name, parameter in parameters.items():
        expected, kept = reference.state(name), optimizer.state[parameter]
        for key, value in expected.items():
            if isinstance(value, Tensor):
                error = (kept[key].reshape(value.shape) - value).norm()
                assert float(error) <= TOLERANCE * max(1e-300, float(value.norm())), (name, key)
            else:
                assert kept[key] == value, (name, key)


def test_the_cases_compress_clip_and_change_windows() -> None:
    """What they are made of, so that the test above cannot pass by doing little."""
    cases = _cases()
    assert len(cases) == 86
    for name, values in _DECKS.items():
        assert {settings[name] for settings, _ in cases} == set(values), name
    compressed = 0
    for settings, shapes in cases:
        parameters = runs.build(shapes)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            rows = Flora(parameters.items(), **settings).report().rows
        compressed += any(row.is_compressed for row in rows)
    # the 20 cases without momentum of matrices compress nothing
    assert compressed >= 35
