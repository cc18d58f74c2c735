# SPDX-License-Identifier: Apache-2.0
"""Elements and bytes that one step gives to collectives, level by level, layout by layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flora_dist.core.state.spec import Geometry
from tests.bench.wire_counter import Collectives, Payload
from tests.bench.wire_setups import Setup, start
from tests.conftest import launched_pool_of

LLAMA_9M = ("llama_9m", (("tokens", 8),))
LLAMA_60M = ("llama_60m", (("tokens", 8),))
WARM_UP = 2
"""Steps before: DDP builds its buckets anew after the first, and tells the ranks in the second."""
RANKS = {"fsdp2 x3": 3, "hsdp 2x2": 4}
LAYOUTS = ("ddp x2", "fsdp2 x2", "fsdp2 x3", "hsdp 2x2", "zero-1 x2", "zero-2 x2", "zero-3 x2")
LEVELS: tuple[dict[str, Any], ...] = (
    *({"micro_batches": number} for number in (1, 4)),
    *({"ratio": ratio, "micro_batches": number} for ratio in (8, 16) for number in (1, 4)),
    {"ratio": 16, "micro_batches": 4, "wire_dtype": "bfloat16"},
)
FEWER: tuple[dict[str, Any], ...] = (
    {"micro_batches": 4},
    *({"ratio": 16, "micro_batches": number} for number in (1, 4)),
)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Elements by the model's shapes and the settings alone."""

    compressed: int
    """Of the parameters that are compressed."""
    dense: int
    """Of the others: 1-D."""
    sketches: int
    """Numbers that stand for the former: rank for each block of each row."""
    parameters: int
    """How many are compressed."""


def expected(geometries: Sequence[Geometry]) -> Expected:
    """What sketches of a model have to be."""
    small = [size for size in geometries if size.rank is not None]
    elements = [_elements(size) for size in geometries]
    return Expected(
        compressed=sum(map(_elements, small)),
        dense=sum(elements) - sum(map(_elements, small)),
        sketches=sum(
            size.num_matrices * size.num_rows * size.blocks_per_row * (size.rank or 0)
            for size in small
        ),
        parameters=len(small),
    )


def _elements(size: Geometry) -> int:
    return size.num_matrices * size.num_rows * size.num_columns


def payloads(setup: Setup) -> list[Payload]:
    """What this rank sends in one step."""
    training = start(setup)
    training.run(range(WARM_UP))
    collectives = Collectives()
    with collectives, collectives.sketches():
        training.accumulate(WARM_UP, collectives.backward)
        training.step()
    return collectives.sent


# ---- tables


def print_counts(only: str) -> None:
    """One row per setup; ``only``: layouts that begin so."""
    print(
        "Elements that a rank gives to the collectives of one step. own: gradients that the\n"
        "framework reduces. ideal: elements of compressed parameters / ratio, times what dense\n"
        "gives of them to collectives at one micro-batch. ragged: rank numbers for the last,\n"
        "shorter block of a row. rest: presence, padding of uneven shards, rows cut twice."
    )
    for title, model, chosen, levels in (
        ("llama-9m", LLAMA_9M, LAYOUTS, LEVELS),
        ("llama-60m", LLAMA_60M, ("ddp x2", "fsdp2 x2", "zero-2 x2"), FEWER),
    ):
        sizes = expected(Setup(layout="ddp", model=model, ratio=16).geometries())
        print(
            f"\n{title}: {sizes.compressed:,} elements in {sizes.parameters} compressed "
            f"parameters, {sizes.dense:,} in 1-D ones"
        )
        print(
            f"{'layout and level':34} {'x':>2} {'own':>12} {'sketches':>11} {'ideal':>11} "
            f"{'ragged':>9} {'rest':>7} {'/ideal':>7} {'sent bytes':>12} {'weights':>12} "
            f"{'messages':>9}"
        )
        for layout in chosen:
            if layout.startswith(only):
                base = Setup(layout=layout.split()[0], model=model)
                _print_layout(layout, [replace(base, **level) for level in levels])


def _print_layout(layout: str, setups: Sequence[Setup]) -> None:
    pool = launched_pool_of(RANKS.get(layout, 2))
    passes = 1.5 if "hsdp" in layout else 1.0  # its second hop carries half of the first
    dense_at_4 = 0
    try:
        for setup in setups:
            sent = max(pool(payloads, setup), key=lambda found: _of(found, "sketches"))
            _print_row(layout, setup, sent, passes)
            if setup.micro_batches == 4:
                own = _of(sent, "gradients") + _of(sent, "sketches")
                dense_at_4 = dense_at_4 or own
                if setup.ratio == 16:
                    print(f"{'':34} {'':>2} {dense_at_4 / own:12.1f} x fewer elements than dense")
    finally:
        pool.close()


def _print_row(layout: str, setup: Setup, sent: Sequence[Payload], passes: float) -> None:
    name = f"{layout}{str(setup).removeprefix(setup.layout)}"
    own, sketches = _of(sent, "gradients"), _of(sent, "sketches")
    cells = f"{'':>11} {'':>9} {'':>7} {'':>7}"
    if setup.ratio is not None:
        sizes = expected(setup.geometries())
        ideal = sizes.compressed / setup.ratio * passes
        ragged = sizes.sketches * passes - ideal
        rest = sketches - ideal - ragged
        cells = f"{ideal:11,.0f} {ragged:9,.0f} {rest:7,.0f} {sketches / ideal:7.4f}"
    reduced = sum(p.bytes for p in sent if p.purpose in {"gradients", "sketches"})
    print(
        f"{name:34} {setup.micro_batches:2} {own:12,} {sketches:11,} {cells} {reduced:12,} "
        f"{_of(sent, 'weights'):12,} {_of(sent, 'messages'):9,}",
        flush=True,
    )


def _of(sent: Sequence[Payload], purpose: str) -> int:
    return sum(payload.elements for payload in sent if payload.purpose == purpose)
