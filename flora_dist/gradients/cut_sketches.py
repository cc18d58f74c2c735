# SPDX-License-Identifier: Apache-2.0
"""Blocks that tensor parallelism cuts: their sketches are sums of what several ranks hold.

Shape suffixes: S cut blocks, N rows, K blocks of a tile, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from flora_dist.core.comm.message import Message, Sender
from flora_dist.core.protocols import Reducer, Terms
from flora_dist.core.step.cut_blocks import add_partial_, edges_of, fill_
from flora_dist.core.step.gradient import SketchedGradient
from flora_dist.core.tiles import Cuts, Tile
from flora_dist.gradients.flow import Flow

Means = Mapping[str, SketchedGradient]


class PartialSketches:
    """Parameters whose pieces the same ranks hold."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self.flows: list[tuple[Flow, Cuts]] = []

    def complete_(self, means: Means) -> None:
        """Add up the pieces of cut blocks in these means, by one message."""
        cut = [(flow, cuts) for flow, cuts in self.flows if flow.part.name in means]
        senders = [
            Sender(kind=flow.part.name, names=(flow.part.name,), cuts=cuts, sends_all=True)
            for flow, cuts in cut
        ]
        pieces = [_pieces(flow, cuts, means[flow.part.name]) for flow, cuts in cut]
        Message(senders, self._reducer).bind(pieces)()
        for (flow, cuts), total in zip(cut, pieces, strict=True):
            for tile, compressed_1NKR in _by_matrix(flow, means[flow.part.name]):
                fill_(compressed_1NKR, total["blocks"], edges_of(tile, flow.geometry, cuts), None)


def partial_sketches(flows: Sequence[Flow]) -> list[PartialSketches]:
    """By the ranks that hold the pieces; empty where no block is cut."""
    found: dict[Reducer, PartialSketches] = {}
    for flow in flows:
        cuts, reducer = flow.part.cuts(flow.geometry.block), flow.part.reducer
        if flow.source.is_partial and cuts.blocks_anywhere and reducer is not None:
            found.setdefault(reducer, PartialSketches(reducer)).flows.append((flow, cuts))
    return list(found.values())


def check_in_full(cut: Sequence[PartialSketches]) -> None:
    """Refuse few bits where blocks are cut: their sketches would be sums of rounded pieces.

    Raises:
        ValueError: naming a parameter.
    """
    for pieces in cut:
        name = pieces.flows[0][0].part.name
        raise ValueError(
            "tensor parallelism must cut no block of gradients in few bits, whose sketch would be "
            f"a sum of rounded pieces; it cuts those of {name!r}. Pass gradient_bits=32 and "
            "wire_bits=32, or a block that divides each rank's columns."
        )


def _pieces(flow: Flow, cuts: Cuts, gradient: SketchedGradient) -> Terms:
    """What this rank has of each cut block's sketch."""
    blocks_1SR = gradient.sketch_ERB.new_zeros(1, len(cuts.blocks), flow.accumulator.rank)
    for tile, compressed_1NKR in _by_matrix(flow, gradient):
        add_partial_(blocks_1SR, compressed_1NKR, edges_of(tile, flow.geometry, cuts))
    return {"blocks": blocks_1SR}


def _by_matrix(flow: Flow, gradient: SketchedGradient) -> Iterator[tuple[Tile, Tensor]]:
    """Each matrix of each tile alone, as a view."""
    for tile, compressed_ENKR in zip(flow.part.tiles, gradient.tiles, strict=True):
        assert isinstance(compressed_ENKR, Tensor), flow.part.name
        for place, matrix in enumerate(range(*tile.matrices)):
            yield replace(tile, matrices=(matrix, matrix + 1)), compressed_ENKR[place : place + 1]
