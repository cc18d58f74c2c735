# SPDX-License-Identifier: Apache-2.0
"""Deals one configuration and one sequence of steps from a seed and a number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flora_dist.core.parameters.names import position_name
from flora_dist.core.state.settings import OF_ONE_GRADIENT, SKETCHES, TRANSFERS
from tests.kernels.paths import scaling

Shape = tuple[int, ...]
WHOLE = "whole"
SHARDED = ("fsdp2", "columns", "flat")
WORLD_SIZE = 2
PRECISIONS = ("float64", "float32", "bfloat16", "float16")
ROUND_TRIPS = ("state_dict", "torch.save", "pickle", "deepcopy")
KINDS = ("normal",) * 5 + ("zero rows", "one element", "tiny", "large", "zeros")
"""Of gradients; most are normal numbers."""
HADAMARD_SIDES = (4, 8, 16)
"""Whole rows of a hadamard sketch are powers of two."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a case."""

    name: str
    shape: Shape
    dtype: str
    group: int
    is_transposed: bool
    """Not contiguous: the transpose of what lies in memory."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One parameter group."""

    settings: dict[str, Any]
    joins: int
    """The step before which it is added; 0: it is given to the constructor."""
    rates: str
    """How lr and weight_decay are given: "number", or a tensor of this dtype."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is special about one step."""

    missing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameters without a gradient, and on which ranks."""
    frozen: frozenset[str] = frozenset()
    """Parameters that are frozen after their gradients have come, and thawed after the step."""
    kinds: dict[str, str] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    """lr of each group."""
    round_trip: str = ""
    """How the optimizer is replaced before the step; empty: not at all."""
    poison: tuple[str, float] | None = None
    """A parameter, and what one element of its gradient is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides a run."""

    label: str
    """Seeds every random number of the run."""
    layout: str
    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...]
    moments: tuple[Moment, ...]
    is_named: bool
    settings: dict[str, Any]
    """Of all groups together."""

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return 1 if self.layout == WHOLE else WORLD_SIZE


def deal(seed: int, number: int, *, ranks: int = 1) -> Case:
    """The case of this number; equal in every process."""
    label = f"{seed}/{number}/{ranks}"
    dealer = random.Random(label)
    layout = WHOLE if ranks == 1 else SHARDED[number % len(SHARDED)]
    is_named = dealer.random() < 0.8
    length = dealer.randint(3, 7)
    groups, parameters = [], list[Parameter]()
    joins = sorted(_join(dealer, place, length, layout) for place in range(dealer.randint(1, 3)))
    for index, first in enumerate(joins):
        settings = _settings(dealer)
        rates = dealer.choice(["number", "number", "float64", "float32"])
        groups.append(Group(settings=settings, joins=first, rates=rates))
        parameters += _parameters(dealer, index, len(parameters), settings, layout, is_named)
    skips = dealer.random() < 0.2
    moments = [
        _moment(dealer, step, groups, parameters, layout, poisons=skips) for step in range(length)
    ]
    return Case(
        label=label,
        layout=layout,
        parameters=tuple(parameters),
        groups=tuple(groups),
        moments=tuple(moments),
        is_named=is_named,
        settings={
            "seed": dealer.choice([0, 1, -(2**63), 2**63 - 1]),
            "skip_nonfinite": skips,
        },
    )


def _join(dealer: random.Random, place: int, length: int, layout: str) -> int:
    """The first group is there from the start; a flat layout cannot be attached later."""
    is_late = place > 0 and layout != "flat" and dealer.random() < 0.5
    return dealer.randint(1, length - 1) if is_late else 0


def _settings(dealer: random.Random) -> dict[str, Any]:
    momentum = dealer.choice(["flora", "flora_strict", "blend", "none"])
    is_blend = momentum == "blend"
    sketch = "hadamard" if is_blend else dealer.choice(SKETCHES)
    block = dealer.choice([2, 4, 8, 8, 16, 32, 64, "full"])
    rank: int | None = dealer.randint(1, 3 if block == "full" else min(block - 1, 4))
    settings = {
        "momentum": momentum,
        "sketch": sketch,
        "transfer": dealer.choice([t for t in TRANSFERS if not (is_blend and t == "paper")]),
        "block": block,
        "rank": dealer.choice([rank] * 7 + [None]),
        "beta1": dealer.choice([0.0, 0.5, 0.9, 0.99]),
        "beta2": dealer.choice([None, None, 0.0, 0.9, 0.999]),
        "blend_gain": dealer.choice([None, 0.0, 1.0, 4.0]),
        "kappa": dealer.choice([1, 2, 3, 5, 1000]),
        "eps": dealer.choice([1e-37, 1e-30, 1e-30, 1e-3]),
        "clip": dealer.choice([None, 0.05, 0.3, 1.0, 10.0]),
        "scale_parameter": scaling(dealer.random()),
        "weight_decay": dealer.choice([0.0, 0.1]),
        "maximize": dealer.random() < 0.2,
        "state_dtype": dealer.choice(["float32", "float32", "bfloat16"]),
        "stochastic_rounding": dealer.random() < 0.7,
    }
    # Of a dealer of its own, so that the cases of a seed stay what they were.
    later = random.Random(repr(settings))
    growth = later.choice([None, None, None, 1.0, 1.01, 2.0])
    younger = {"blend": "ademamix", "none": "vectors"}.get(momentum, momentum)
    momentum = later.choice([momentum, momentum, younger])
    normalise = later.choice(["factored", "factored", *OF_ONE_GRADIENT])
    # Again of a dealer of its own, for the same reason.
    latest = random.Random(repr((settings, growth)))
    if latest.random() < 0.2 and momentum in {"blend", "flora_strict"}:
        momentum = {"blend": "subspace_adam", "flora_strict": "apollo"}[momentum]
        normalise = "factored"
    elif normalise == "factored" and random.Random(repr((growth, settings))).random() < 0.2:
        normalise = "racs"
    return {**settings, "growth": growth, "momentum": momentum, "normalise": normalise}


def _parameters(
    dealer: random.Random,
    group: int,
    first: int,
    settings: dict[str, Any],
    layout: str,
    is_named: bool,
) -> list[Parameter]:
    """One to four; a flat tensor has one dtype, and rounds nothing."""
    common = dealer.choice(PRECISIONS[:2])
    made = []
    for position in range(first, first + dealer.randint(1, 4)):
        shape = _shape(dealer, settings, layout)
        while position == 0 and 0 in shape:  # something has to train
            shape = _shape(dealer, settings, layout)
        made.append(
            Parameter(
                name=f"part{position}" if is_named or layout == "flat" else position_name(position),
                shape=shape,
                dtype=common if layout == "flat" else dealer.choice(PRECISIONS),
                group=group,
                is_transposed=layout == WHOLE and len(shape) == 2 and dealer.random() < 0.2,
            )
        )
    return made


def _shape(dealer: random.Random, settings: dict[str, Any], layout: str) -> Shape:
    def size(largest: int) -> int:
        return dealer.randint(1, largest)

    short: list[Shape] = [(size(30),), (size(3),)]
    if layout != "fsdp2":  # fully_shard takes no scalars
        short.append(())
    if layout == WHOLE:
        short.append(dealer.choice([(0,), (0, 5), (4, 0), (2, 0, 9)]))
    if settings["block"] == "full" and settings["sketch"] == "hadamard":
        rows, columns = dealer.choice(HADAMARD_SIDES), dealer.choice(HADAMARD_SIDES)
        return dealer.choice([(rows, columns)] * 3 + [(size(3), columns, 16)] * 2 + short)
    long: list[Shape] = [
        (size(20), size(70)),
        (size(5), 40 + size(100)),
        (16, 32),
        (size(4), size(6), 7 + size(30)),
        (size(12), size(9), size(7)),
        (size(8), size(4), size(3), size(3)),
        (size(5), size(3), size(3), size(2), size(3)),
    ]
    return dealer.choice(long + short)


def _moment(
    dealer: random.Random,
    step: int,
    groups: Sequence[Group],
    parameters: Sequence[Parameter],
    layout: str,
    *,
    poisons: bool,
) -> Moment:
    here = [p for p in parameters if groups[p.group].joins <= step]
    base = [dealer.choice([1e-4, 1e-2, 0.1]) for _ in groups]
    # A first step of rate 0 on zeros counts for nothing, by design: rate 0 meets normal numbers.
    is_still = step > 0 and dealer.random() < 0.1
    kinds = {p.name: "normal" if is_still else dealer.choice(KINDS) for p in here}
    trips = ROUND_TRIPS if layout == WHOLE else ROUND_TRIPS[:1]
    full = [p for p in here if 0 not in p.shape]
    poison = None
    if poisons and full and dealer.random() < 0.4:
        poison = (dealer.choice(full).name, dealer.choice([float("nan"), float("inf")]))
    round_trip = dealer.choice(trips) if dealer.random() < 0.2 else ""
    # A new or copied optimizer has to find some gradient at its first step.
    return Moment(
        missing=_missing(dealer, here, layout, first=1 if round_trip or not step else 0),
        frozen=_frozen(dealer, here, layout),
        kinds=kinds,
        rates=tuple(0.0 if is_still else rate for rate in base),
        round_trip=round_trip,
        poison=poison,
    )


def _missing(
    dealer: random.Random, here: Sequence[Parameter], layout: str, *, first: int
) -> dict[str, tuple[int, ...]]:
    """Who has no gradient, and on which ranks, from the ``first`` unit on.

    What no axis of a mesh cuts is whole on every rank, so its gradient is there on all or on none.
    """
    everyone = (0,) if layout == WHOLE else (0, 1)
    missing = {}
    for unit in _units(here, layout)[first:]:
        choices = [everyone] if layout == WHOLE or not unit[0].shape else [everyone, (0,), (1,)]
        if dealer.random() < 0.2:
            missing.update(dict.fromkeys((p.name for p in unit), dealer.choice(choices)))
    return missing


def _frozen(dealer: random.Random, here: Sequence[Parameter], layout: str) -> frozenset[str]:
    """The first unit trains, so that a run begins with something."""
    if dealer.random() < 0.8:
        return frozenset()
    units = [unit for unit in _units(here, layout)[1:] if dealer.random() < 0.5]
    return frozenset(parameter.name for unit in units for parameter in unit)


def _units(here: Sequence[Parameter], layout: str) -> list[list[Parameter]]:
    """Parameters that have a tensor for the optimizer in common; the first of them can train."""
    units: dict[object, list[Parameter]] = {}
    for parameter in sorted(here, key=lambda p: 0 in p.shape):
        key = parameter.group if layout == "flat" else parameter.name
        units.setdefault(key, []).append(parameter)
    return list(units.values())
