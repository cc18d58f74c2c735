# SPDX-License-Identifier: Apache-2.0
"""The sceptic's table: each rule is tuned by as many runs as AdamW, over what it has to tune.

    python -m tests.bench.quality --table sceptic --size small

A rule stands there in six variants, changed in one setting each, and every variant is run at the
same six learning rates, a factor of 1.5 apart. The best of the 36 gets the other seeds. Gradients
are clipped at a norm of 1 for everyone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_dist.core.state.presets import SCALE
from tests.bench.quality_plan import Row, Size

FULL = Size(steps=800, layers=None, grid=(-1, 0, 1, 2, 3, 4), factor=1.5, extensions=0, seeds=3)
"""1e-3 x 1.5^e: 0.67e-3 to 5.1e-3."""
QUICK = Size(
    steps=240,
    layers=None,
    grid=(0, 2),
    factor=1.5,
    extensions=0,
    seeds=1,
    sequences=128,
)
LATE = 0.2
"""Part of the steps that a long warm-up takes."""
VARIANTS = 6
Change = Mapping[str, Any]
SHARP: Change = {"orthogonalise": None}
"""Of the ends of a model, as in Muon."""


def sceptic_rows() -> tuple[Row, ...]:
    """Every rule in its variants."""
    return (
        *_adamw(),
        *_family("default", {}, {"beta2": 0.95}, {"blend_gain": 0.5}, {"beta1": 0.95}),
        *_family(
            "blend, rank 8, gain 2",
            {"rank": 8, "blend_gain": 2.0},
            {"beta2": 0.95},
            {"clip": 2.0},
            {"beta1": 0.8},
        ),
        *_family(
            "ademamix",
            {"momentum": "ademamix", "beta1": 0.99},
            {"beta1": 0.9},
            {"blend_gain": 4.0},
            {"beta2": 0.95},
        ),
        *_family(
            "vectors", {"momentum": "vectors"}, {"beta2": 0.95}, {"clip": 2.0}, {"beta1": 0.8}
        ),
        *_family(
            "near RACS",
            {"momentum": "vectors", "beta2": 0.9, "growth": 1.01},
            {"beta2": 0.99},
            {"growth": 1.1},
            {"roles": {"head": {"momentum": "blend", "rank": None}}},
        ),
        *_family(
            "orthogonal tiles",
            {"orthogonalise": 64, "roles": {"head": SHARP, "embedding": SHARP}},
            {"orthogonalise": 32},
            {"momentum": "vectors"},
            {"beta1": 0.95},
        ),
        *_family("SCALE", SCALE, {"beta1": 0.95}, {"clip": 1.0}, {"beta2": 0.95}),
    )


def _adamw() -> Iterator[Row]:
    """beta2, weight decay, warm-up and beta1 around what most papers have."""
    betas = {"betas": (0.9, 0.95)}
    changes: Sequence[Change] = ({"betas": (0.9, 0.99)}, {"betas": (0.9, 0.999)})
    yield from _variants("AdamW", "adamw", {"weight_decay": 0.0} | betas, changes)
    yield Row(
        name="AdamW, beta1 0.8",
        factor="AdamW",
        family="AdamW",
        optimizer="adamw",
        options={"weight_decay": 0.0, "betas": (0.8, 0.95)},
        max_norm=1.0,
    )


def _family(rule: str, options: Change, *changes: Change) -> Iterator[Row]:
    yield from _variants(rule, "flora", {"weight_decay": 0.0, **options}, changes)


def _variants(
    rule: str, optimizer: str, centre: Change, changes: Sequence[Change]
) -> Iterator[Row]:
    """The centre, weight decay, a long warm-up, and what a rule has of its own."""
    named: dict[str, Change] = {rule: {}, f"{rule}, weight decay 0.1": {"weight_decay": 0.1}}
    named |= {f"{rule}, {_shown(change)}": change for change in changes}
    common = {"factor": rule, "family": rule, "optimizer": optimizer, "max_norm": 1.0}
    for name, change in named.items():
        yield Row(name=name, options={**centre, **change}, **common)
    yield Row(name=f"{rule}, warm-up {LATE:g}", options=centre, warmup=LATE, **common)


def _shown(change: Change) -> str:
    ((name, value),) = change.items()
    return f"{name} {'head' if name == 'roles' else value}"


def draw_nothing(found: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """The table says it all."""
    del found, folder, title
