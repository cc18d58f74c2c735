# SPDX-License-Identifier: Apache-2.0
"""What kernels add to messages of a batch of matrices: the terms of core/step/matrix.py, in order.

Shape suffixes: S matrices that are summed, P parameters, L cut rows, M columns, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flora_dist.core.protocols import Terms
from flora_dist.core.step.batch import Batch

Named = tuple[str, tuple[int, ...]]
"""A term's name and shape."""


def first_terms(batch: Batch, num_sums: int) -> Iterator[Named]:
    """Those of message 1; ``num_sums`` by column: of G^2, of G^2 / R, of G (M A) / sqrt(R)."""
    members, columns = len(batch.members), batch.geometry.num_columns
    summed = members * batch.matrices_summed
    yield "presence", (members,)
    yield "columns", (summed, columns)
    if num_sums > 1:
        yield "squares", (summed, columns)
    if num_sums > 2:
        yield "cross", (summed, columns)
        yield "history", (summed,)
    if batch.config.scales_matrices:
        yield "weight", (summed,)
    cuts = batch.members[0].cuts
    if cuts.rows_anywhere and cuts.are_few:
        yield "elements", (members, len(cuts.rows), columns)
        if num_sums > 2:
            yield "products", (members, len(cuts.rows), columns)
    elif cuts.rows_anywhere:
        yield "rows", (members, len(cuts.rows))


def second_terms(batch: Batch, num_sums: int) -> Iterator[Named]:
    """Those of message 2, where many rows are cut: what these add to the norms, cut blocks."""
    members, cuts = len(batch.members), batch.members[0].cuts
    if cuts.are_few:
        return
    summed = members * batch.matrices_summed
    if cuts.rows_anywhere and num_sums > 1:
        yield "squares", (summed,)
        if num_sums > 2:
            yield "cross", (summed,)
    if cuts.blocks_anywhere and batch.sketches is not None:
        assert batch.geometry.rank is not None
        yield "blocks", (members, len(cuts.blocks), batch.geometry.rank)


def make_terms(shapes: Sequence[Named], device: torch.device) -> tuple[Tensor, Terms]:
    """Zeros in float32 in one buffer, and terms that lie in it one after the other."""
    sizes = [torch.Size(shape).numel() for _, shape in shapes]
    buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
    parts = torch.split(buffer, sizes)
    return buffer, {
        name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)
    }
