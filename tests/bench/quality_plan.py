# SPDX-License-Identifier: Apache-2.0
"""What the quality bench compares: its rows, its learning rates, and which run comes next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

# Spelled out, so that the table does not move when a default of Flora does.
CENTRE: dict[str, Any] = {
    "momentum": "blend",
    "rank": 8,
    "block": 64,
    "sketch": "hadamard",
    "blend_gain": 2.0,
    "beta1": 0.9,
    "kappa": 1000,
    "transfer": "shrink",
    "clip": 1.0,
}
"""What the other rows change one factor of."""
FLORA = CENTRE | {"momentum": "flora"}
"""The centre of what blend cannot have: other sketches, transfer="paper"."""
GRID = (-1, 0, 1, 2)
"""Exponents e of the learning rates 1e-3 * 2^e that rows are run with."""
BASE_LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One optimizer with one setting."""

    name: str
    factor: str
    """What varies among the rows of the same factor."""
    optimizer: str
    """adamw, adafactor, muon (torch's), adamw8, galore, lion, flora or paper (Flora.paper)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    matrices: Mapping[str, Any] = field(default_factory=dict)
    """Flora: what parameters of two or more dims have instead."""
    ends: Mapping[str, Any] = field(default_factory=dict)
    """Flora: what embedding and head have instead, over `matrices`."""
    whole_rows: int | None = None
    """Flora: block="full" with rank = smaller side / this, for each matrix."""
    gradient_rank: int | None = None
    """Flora: gradients are kept as sketches, this many numbers per block; None: dense."""
    gradient_bits: int = 32
    """Of each of these numbers."""
    family: str = ""
    """The rule that this row is a variant of, all of which are tuned as one; empty: its own."""
    warmup: float = 0.05
    """Part of the steps in which lr rises."""
    max_norm: float | None = None
    """Gradients are clipped to it."""
    micro_batches: int = 1
    """What a step's sketches are the sum of; in few bits they are rounded after each."""
    steps_per_batch: int = 1
    """Steps that a global batch is cut into, on equal parts of it; more than 1: no accumulation."""
    precision: str = "float32"
    """As `train.precision` in the trainer's config has it."""
    norms: str | None = None
    """Dtype of the weights of norms; None: as all others."""

    @property
    def scales_by_weight(self) -> bool:
        """The optimizer multiplies lr by RMS(weight): its lr is relative."""
        own = self.options.get("scale_parameter", False)
        return self.optimizer in {"adafactor", "paper"} or own is True


class Run(NamedTuple):
    """One training run: a row, a learning rate and a seed."""

    row: str
    exponent: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long each run is; equal for all rows."""

    steps: int
    layers: int | None
    """Layers of the model; None: as its file says."""
    global_batch: int = 8
    """Sequences per step."""
    sequence_length: int = 64
    """Tokens per sequence."""
    evaluations: int = 8
    """Validation losses along a run, the last one at its end."""
    sequences: int = 256
    """Validation sequences, evenly spread."""
    seeds: int = 2
    """The first for every learning rate, the others for the best one only."""
    grid: tuple[int, ...] = GRID
    """Exponents of the learning rates that every row is run with."""
    factor: float = 2.0
    """From one learning rate of the grid to the next."""
    extensions: int = 2
    """Learning rates that a row whose best lies at an end of the grid may add beyond it."""


ADAMW = "AdamW"
CENTRE_NAME = "blend, ratio 8"
FULL_MOMENTUM = "full momentum"
CONTROL = "control: momentum on 1-D only"
NONE = "none"
# Measured for llama-9m's width on one core: a step of FULL takes 26 ms with AdamW, 34 with blend,
# 37 with flora_strict at ratio 2, and a run 2 s beside its steps.
FULL = Size(steps=800, layers=2)
QUICK = Size(steps=240, layers=1, sequences=128, extensions=1)
QUICK_ROWS = (
    ADAMW,
    NONE,
    CONTROL,
    "Adafactor (torch)",
    "flora, ratio 8",
    CENTRE_NAME,
    "Flora.paper, ratio 8",
)


def lr_of(row: Row, exponent: int, initial_rms: float, factor: float = 2.0) -> float:
    """The learning rate of a run: 1e-3 * factor^exponent in units of the weights.

    Optimizers that multiply by RMS(weight) get it over the RMS that matrices start with, so the
    same grid means the same sizes of the first updates for everyone.
    """
    lr = BASE_LR * factor**exponent
    return lr / initial_rms if row.scales_by_weight else lr


def all_rows() -> tuple[Row, ...]:
    """Every row of the table, the most telling ones first."""
    return (
        *_baselines(),
        *_ratios(),
        *_embeddings(),
        *_paper(),
        *_scaled(),
        *_blends("gain", {"blend_gain": (1.0, 4.0, 8.0)}),
        *_projections(),
        *_roles(),
        *_blends("beta1", {"beta1": (0.8, 0.95)}),
        *_blends("clip", {"clip": (None, 2.0)}),
        *_blocks(),
        *_windows(),
        *_sketches(),
    )


def rows_named(names: Sequence[str], table: Sequence[Row]) -> tuple[Row, ...]:
    """The rows of a table with these names, in the table's order.

    Raises:
        ValueError: a name no row has.
    """
    known = {row.name: row for row in table}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"rows are chosen by name; {unknown} are none of {'; '.join(known)}. Correct --rows."
        )
    return tuple(row for name, row in known.items() if name in names)


def _flora(name: str, factor: str, options: Mapping[str, Any], **more: Any) -> Row:
    return Row(name=name, factor=factor, optimizer="flora", options=options, **more)


def _baselines() -> Iterator[Row]:
    without: dict[str, Any] = {"weight_decay": 0.0}
    quicker = without | {"betas": (0.9, 0.95)}
    no_momentum = {"momentum": "none"}
    yield Row(name=ADAMW, factor="baseline", optimizer="adamw", options=without)
    yield _flora(NONE, "baseline", CENTRE | no_momentum)
    yield _flora(CONTROL, "baseline", CENTRE, matrices=no_momentum)
    yield _flora(FULL_MOMENTUM, "baseline", CENTRE | {"rank": None})
    yield Row(name="AdamW, beta2 0.95", factor="baseline", optimizer="adamw", options=quicker)
    # Always scales by the weight, and keeps its lr below step^-0.5.
    yield Row(name="Adafactor (torch)", factor="baseline", optimizer="adafactor")
    yield _flora(
        "control: momentum on 1-D, embedding, head",
        "baseline",
        CENTRE,
        matrices=no_momentum,
        ends={"momentum": "blend", "rank": None},
    )


def _ratios() -> Iterator[Row]:
    for ratio in (8, 4, 16, 2):
        for rule in ("blend", "flora", "flora_strict"):
            options = CENTRE | {"momentum": rule, "rank": 64 // ratio}
            yield _flora(f"{rule}, ratio {ratio}", "ratio", options)


def _embeddings() -> Iterator[Row]:
    yield _flora("blend, embedding and head dense", "embedding", CENTRE, ends={"rank": None})


def _paper() -> Iterator[Row]:
    for ratio in (8, 2):
        name = f"Flora.paper, ratio {ratio}"
        yield Row(name=name, factor="paper", optimizer="paper", whole_rows=ratio)


def _scaled() -> Iterator[Row]:
    """What torch's Adafactor and Flora.paper have besides: is it the scale or the momentum?"""
    for rule in ("blend", "none"):
        options = CENTRE | {"momentum": rule, "scale_parameter": True}
        yield _flora(f"{rule}, scale_parameter", "scale", options)


def _blends(factor: str, changes: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    for option, values in changes.items():
        for value in values:
            shown = f"{value:g}" if isinstance(value, float) else value
            yield _flora(f"blend, {option} {shown}", factor, CENTRE | {option: value})


def _projections() -> Iterator[Row]:
    """Gain 1, which no lr makes unstable; at ratio 2 the centre's is the whole of the momentum."""
    for ratio in (4, 2):
        options = CENTRE | {"rank": 64 // ratio, "blend_gain": 1.0}
        yield _flora(f"blend, ratio {ratio}, blend_gain 1", "gain", options)
    # The bytes of the centre, whose momentum is float32.
    half = CENTRE | {"rank": 16, "blend_gain": 1.0, "state_dtype": "bfloat16"}
    yield _flora("blend, ratio 4, blend_gain 1, bf16 state", "gain", half)


def _roles() -> Iterator[Row]:
    """Momentum for the head alone, as SCALE has it (arXiv 2506.16659)."""
    heads = {"roles": {"head": {"momentum": "blend", "rank": None}}}
    yield _flora("none, head dense", "role", CENTRE | {"momentum": "none"} | heads)
    yield _flora("blend, head dense", "role", CENTRE | heads)


def _blocks() -> Iterator[Row]:
    for options in (CENTRE, FLORA):
        rule = options["momentum"]
        for block in (16, 256):
            blocked = options | {"block": block, "rank": block // 8}
            yield _flora(f"{rule}, block {block}", "block", blocked)
        yield _flora(f"{rule}, block full", "block", options, whole_rows=8)


def _windows() -> Iterator[Row]:
    yield from _blends("kappa", {"kappa": (20, 200)})
    # Only a window change moves the momentum, and short runs see none with kappa 1000.
    often = {"kappa": 20, "transfer": "reset"}
    yield _flora("blend, kappa 20, transfer reset", "transfer", CENTRE | often)
    for transfer in ("shrink", "paper", "reset"):
        options = FLORA | {"kappa": 20, "transfer": transfer}
        yield _flora(f"flora, kappa 20, transfer {transfer}", "transfer", options)


def _sketches() -> Iterator[Row]:
    for sketch in ("gaussian", "rademacher"):
        yield _flora(f"flora, {sketch}", "sketch", FLORA | {"sketch": sketch})


def next_runs(rows: Sequence[Row], losses: Mapping[Run, float], size: Size) -> list[Run]:
    """Runs that are missing and can be told already: the grid, beyond it, then the other seeds."""
    return [
        run
        for row in rows
        for run in _grid_missing(row.name, losses, size) or _seeds_missing(row.name, losses, size)
    ]


def _grid_missing(row: str, losses: Mapping[Run, float], size: Size) -> list[Run]:
    if missing := [r for e in size.grid if (r := Run(row, e, 0)) not in losses]:
        return missing
    tried = exponents_tried(row, losses)
    best = best_exponent(row, losses)
    if best in {tried[0], tried[-1]} and len(tried) < len(size.grid) + size.extensions:
        return [Run(row, best - 1 if best == tried[0] else best + 1, 0)]
    return []


def _seeds_missing(row: str, losses: Mapping[Run, float], size: Size) -> list[Run]:
    best = best_exponent(row, losses)
    return [r for seed in range(1, size.seeds) if (r := Run(row, best, seed)) not in losses]


def exponents_tried(row: str, losses: Mapping[Run, float]) -> list[int]:
    """The learning rates that a row has a loss for, ascending."""
    return sorted(run.exponent for run in losses if run.row == row and run.seed == 0)


def best_exponent(row: str, losses: Mapping[Run, float]) -> int:
    """The learning rate of the lowest validation loss with the first seed; diverged is worst."""

    def loss(exponent: int) -> float:
        value = losses[Run(row, exponent, 0)]
        return value if math.isfinite(value) else math.inf

    return min(exponents_tried(row, losses), key=loss)


def expected_runs(rows: Sequence[Row], size: Size) -> int:
    """How many runs to expect; about every other row leaves the grid once more than it must."""
    bracket = max(3, len(size.grid))  # a best between two worse ones
    return len(rows) * (bracket + size.seeds - 1) + len(rows) // 2


def resized(size: Size, **given: int | None) -> Size:
    """The same size but for the fields given; None is not given."""
    return replace(size, **{name: value for name, value in given.items() if value is not None})
