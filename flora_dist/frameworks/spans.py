# SPDX-License-Identifier: Apache-2.0
"""Flat partitions of an engine as spans of parameters, and the proof that they are right."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.comm.groups import gather
from flora_dist.core.layouts.flat import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One flat tensor of this rank, and what every rank of its group holds of its parameters."""

    flat: Tensor
    param_group: int
    """Index among the optimizer's parameter groups."""
    process_group: dist.ProcessGroup
    spans: tuple[Span, ...]
    weights: Sequence[Callable[[int, int], Tensor]]
    """For each span: this rank's elements [start, stop) as the model itself holds them."""


def check_partitions(partitions: Sequence[Partition], *, framework: str, tested: str) -> None:
    """Prove that the spans of all ranks tile every parameter and hold its weights.

    Every rank raises if one has to.

    Raises:
        RuntimeError: the engine lays its partitions out otherwise.
    """
    for partition in partitions:
        group = partition.process_group
        mine = ([(span.name, _digest(span)) for span in partition.spans], _wrong(partition))
        everyone = gather(mine, group)
        found = [wrong for _, wrong in everyone if wrong]
        found += _disagreements([listed for listed, _ in everyone])
        # Of this rank's map; that all have it was just shown, so all find the same.
        found += _gaps(partition.spans)
        if found:
            raise RuntimeError(
                f"the spans of all ranks must tile every parameter and hold its weights; {found[0]}"
                f" with {framework}. Use a version that was tested: {tested}."
            )


def _wrong(partition: Partition) -> str:
    """The first span whose elements of the flat tensor are not the model's; empty if none."""
    rank = dist.get_rank(partition.process_group)
    for span, weight in zip(partition.spans, partition.weights, strict=True):
        start, stop = span.owned[rank]
        theirs = weight(start, stop)
        ours = partition.flat.detach()[span.offset : span.offset + stop - start]
        if theirs.shape != ours.shape or not _are_equal(ours, theirs):
            return f"{span.name!r} [{start}, {stop}) differs on rank {rank}"
    return ""


def _are_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Masters are wider than the model's weights; NaN equals NaN."""
    ours = ours.to(device=theirs.device, dtype=theirs.dtype)
    return torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)


def _digest(span: Span) -> bytes:
    """Stands for who holds what of a parameter; the whole map would grow with the ranks' square."""
    return hashlib.sha256(repr((span.shape, span.owned)).encode()).digest()[:8]


def _disagreements(listed: Sequence[Sequence[tuple[str, bytes]]]) -> Iterator[str]:
    """Parameters that ranks list or cut differently; ``listed`` is equal on all ranks."""
    for entries in itertools.zip_longest(*listed):
        if len(set(entries)) > 1:
            yield f"ranks disagree on who holds {next(e[0] for e in entries if e)!r}"


def _gaps(spans: Sequence[Span]) -> Iterator[str]:
    for span in spans:
        ends = [0, *(end for _, end in span.owned)]
        starts = [*(start for start, _ in span.owned), math.prod(span.shape)]
        if ends != starts:
            yield f"{span.name!r} is not covered by {span.owned}"
