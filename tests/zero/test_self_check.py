# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` proves about DeepSpeed's partitions: a wrong map is refused on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist

from flora_dist.core.layouts.flat import Span, cut_line
from flora_dist.frameworks.deepspeed import attach as integration
from flora_dist.frameworks.spans import Partition
from tests.conftest import launched_pool_of
from tests.zero.small import PARAMS, build, config_of, start

pytestmark = pytest.mark.deepspeed
Mutation = Callable[[Sequence[Span]], Sequence[Span]]


def shifted_offset(spans: Sequence[Span]) -> Sequence[Span]:
    """One parameter's elements a place further in the flat tensor."""
    at = next(i for i, span in enumerate(spans) if _is_here(span))
    return [*spans[:at], replace(spans[at], offset=spans[at].offset + 1), *spans[at + 1 :]]


def swapped_names(spans: Sequence[Span]) -> Sequence[Span]:
    """Two parameters under each other's names, shapes as they were."""
    first, second, *rest = spans
    return [replace(first, name=second.name), replace(second, name=first.name), *rest]


def another_size(spans: Sequence[Span]) -> Sequence[Span]:
    """The same line cut in smaller partitions."""
    shapes = [(span.name, span.shape) for span in spans]
    sizes = [span.owned[-1][1] for span in spans]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = sum(sizes) // world_size - 5
    return cut_line(shapes, offsets=offsets, size=size, rank=rank, world_size=world_size)


def wrong_about_others(spans: Sequence[Span]) -> Sequence[Span]:
    """This rank's own elements are right; the other rank's are said to be one fewer."""
    at = next(i for i, span in enumerate(spans) if span.owned[1 - dist.get_rank()][1] > 0)
    owned = list(spans[at].owned)
    start, stop = owned[1 - dist.get_rank()]
    owned[1 - dist.get_rank()] = (start, stop - 1)
    return [*spans[:at], replace(spans[at], owned=tuple(owned)), *spans[at + 1 :]]


def left_out(spans: Sequence[Span]) -> Sequence[Span]:
    """The last parameter is not in the map."""
    return spans[:-1]


def _is_here(span: Span) -> bool:
    start, stop = span.owned[dist.get_rank()]
    return start < stop


@contextmanager
def wrong_map(mutate: Mutation, ranks: Sequence[int]) -> Iterator[None]:
    """These ranks read DeepSpeed's partitions wrongly."""
    original = integration._partitions_of

    def partitions_of(*arguments: Any) -> list[Partition]:
        return [
            replace(p, spans=tuple(mutate(p.spans)), weights=p.weights[: len(mutate(p.spans))])
            for p in original(*arguments)
        ]

    if dist.get_rank() in ranks:
        integration._partitions_of = partitions_of
    try:
        yield
    finally:
        integration._partitions_of = original


def refused(stage: int, mutate: Mutation, ranks: Sequence[int]) -> str:
    blocks: dict[str, Any] = {"optimizer": {"type": "Flora", "params": PARAMS}}
    with (
        wrong_map(mutate, ranks),
        pytest.raises(RuntimeError, match="the spans of all ranks must tile") as caught,
    ):
        start(config_of(stage, **blocks), model=build())
    return str(caught.value)


FAULTS = [
    (mutate, ranks)
    for mutate in (shifted_offset, swapped_names, another_size, left_out)
    for ranks in ((0,), (1,), (0, 1))
    # Where all ranks read DeepSpeed in the same wrong way, what they hold must show it.
    if len(ranks) == 1 or mutate in (shifted_offset, another_size)
]


@pytest.mark.parametrize(("mutate", "ranks"), FAULTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_wrong_map_is_refused_on_every_rank(
    stage: int, mutate: Mutation, ranks: tuple[int, ...]
) -> None:
    messages = launched_pool_of(2)(refused, stage, mutate, ranks)
    assert all(f"DeepSpeed {deepspeed.__version__}" in message for message in messages)
    assert all("tested: 0.19.8" in message for message in messages)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_is_wrong_about_another_is_refused_on_both(stage: int) -> None:
    messages = launched_pool_of(2)(refused, stage, wrong_about_others, (1,))
    assert all("who holds" in message or "not covered" in message for message in messages)


def low_precision(stage: int) -> None:
    config = config_of(stage, bf16={"enabled": True})
    start(config)
    with (
        wrong_map(shifted_offset, (1,)),
        pytest.raises(RuntimeError, match=r"differs on rank 1 with DeepSpeed"),
    ):
        start(config)


@pytest.mark.parametrize("stage", [1, 3])
def test_fp32_masters_are_compared_with_the_bf16_weights(stage: int) -> None:
    launched_pool_of(2)(low_precision, stage)
