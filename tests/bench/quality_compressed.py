# SPDX-License-Identifier: Apache-2.0
"""The second table of the quality bench: what is lost when gradients are kept as sketches.

``many_rows`` are a table of their own, since 16 micro-batches take 16 sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.bench.quality_plan import (
    ADAMW,
    CENTRE,
    CENTRE_NAME,
    FULL_MOMENTUM,
    NONE,
    Row,
    Size,
    all_rows,
    rows_named,
)

RATIOS = (8, 4, 16, 2)
RULES = ("blend", "flora", "flora_strict", "none")
EQUAL_BYTES = ((64, 4), (64, 2), (64, 1), (16, 16), (32, 8), (32, 4), (16, 8))
"""Numbers per block of 64, and bits of each: 1/8, 1/16 and 1/32 of fp32's bytes, but for scales."""
MOST_MICRO_BATCHES = 8
"""One for every sequence of a step."""
MANY_MICRO_BATCHES = 16
"""The same, where a step has twice as many of half the length."""
STATES = ((32, 8), (32, 4), (8, 8), (8, 4))
"""The same of a momentum."""
STATES_OF_DEFAULT = ((16, 32), (16, 8), (16, 4), (8, 8), (8, 4))
"""The same at gain 1, the default, whose 16 numbers of 32 bits come first."""
MICRO_BATCHES = 4
"""Steps per global batch without accumulation."""
# Smaller than the first table, and bracketed from two learning rates instead of four: a step with
# sketches takes twice AdamW's on matrices this small, and the best lie between 5e-4 and 4e-3.
FULL = Size(steps=320, layers=1, evaluations=4, grid=(0, 1), extensions=3)
QUICK = Size(steps=120, layers=1, evaluations=4, sequences=128, grid=(0, 1), extensions=1)
QUICK_ROWS = (ADAMW, CENTRE_NAME, "blend, gradient ratio 8", "none, gradient ratio 8")
MANY_FULL = replace(FULL, global_batch=MANY_MICRO_BATCHES, sequence_length=32, seeds=3)
"""As many tokens in a step, and in a run."""
MANY_QUICK = replace(QUICK, global_batch=MANY_MICRO_BATCHES, sequence_length=32)
MANY_QUICK_ROWS = (CENTRE_NAME, f"blend, gradient 64 x 4 bits, {MANY_MICRO_BATCHES} micro-batches")


def compressed_rows() -> tuple[Row, ...]:
    """Every row of the table, the most telling ones first."""
    return (
        *rows_named([ADAMW, NONE, CENTRE_NAME], all_rows()),
        *_at(RATIOS[0]),
        *_without_accumulation(),
        *(row for rank, bits in EQUAL_BYTES for row in _few_bits(rank, bits, MOST_MICRO_BATCHES)),
        *(_state(rank, bits) for rank, bits in STATES),
        *(_state_of_default(rank, bits) for rank, bits in STATES_OF_DEFAULT),
        *(row for ratio in RATIOS[1:] for row in _at(ratio)),
        *rows_named(["flora, ratio 8", "flora_strict, ratio 8", FULL_MOMENTUM], all_rows()),
        # Does it take a momentum over all elements to average the noise of sketches?
        _sketched(f"{FULL_MOMENTUM}, gradient ratio 8", 8, {"rank": None}),
    )


def gradient_ratio(rank: int | None) -> float:
    """Elements per number that is kept; 1 where gradients are dense."""
    return 1 if rank is None else CENTRE["block"] / rank


def _at(ratio: int) -> Iterator[Row]:
    """The momentum keeps the centre's rank; only what the step gets to see varies."""
    for rule in RULES:
        yield _sketched(f"{rule}, gradient ratio {ratio}", ratio, {"momentum": rule})


def _sketched(name: str, ratio: int, changes: dict[str, Any]) -> Row:
    return Row(
        name=name,
        factor=f"gradient ratio {ratio}",
        optimizer="flora",
        options=CENTRE | changes,
        gradient_rank=CENTRE["block"] // ratio,
    )


def many_rows() -> tuple[Row, ...]:
    """All numbers in few bits, rounded once and after each of many micro-batches."""
    return (
        *rows_named([CENTRE_NAME, NONE, ADAMW], all_rows()),
        *(row for bits in (4, 2, 1) for row in _few_bits(64, bits, MANY_MICRO_BATCHES)),
    )


def _few_bits(rank: int, bits: int, several: int) -> Iterator[Row]:
    for rule in ("blend", "none"):
        for micro_batches in (1, several):
            after = "" if micro_batches == 1 else f", {micro_batches} micro-batches"
            yield Row(
                name=f"{rule}, gradient {rank} x {bits} bits{after}",
                factor=f"gradient of {bits} bits",
                optimizer="flora",
                options=CENTRE | {"momentum": rule},
                gradient_rank=rank,
                gradient_bits=bits,
                micro_batches=micro_batches,
            )


def _state(rank: int, bits: int) -> Row:
    return Row(
        name=f"blend, momentum {rank} x {bits} bits",
        factor="momentum of few bits",
        optimizer="flora",
        options=CENTRE | {"rank": rank, "state_bits": bits},
    )


def _state_of_default(rank: int, bits: int) -> Row:
    row = _state(rank, bits)
    return replace(row, name=f"{row.name}, gain 1", options=row.options | {"blend_gain": 1.0})


def _without_accumulation() -> Iterator[Row]:
    """What accumulation is for: the same tokens, a step after every micro-batch."""
    for row in rows_named([ADAMW, CENTRE_NAME], all_rows()):
        yield Row(
            name=f"{row.name}, no accumulation",
            factor="no accumulation",
            optimizer=row.optimizer,
            options=row.options,
            steps_per_batch=MICRO_BATCHES,
        )
