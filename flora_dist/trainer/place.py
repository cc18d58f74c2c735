# SPDX-License-Identifier: Apache-2.0
"""What of a network's parameters a process keeps, and a network of which it keeps no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Rows = dict[str, Tensor]
"""What this process keeps of each parameter, by name; whoever fills a network takes them out."""


class Unfit(RuntimeError):
    """A network that does not come to be parameter after parameter."""


class Place(Protocol):
    """What of each parameter a process keeps."""

    def cut(self, shape: torch.Size) -> slice:
        """The fewest entries along the first dimension that hold all of it."""

    def part(self, rows: Tensor, shape: torch.Size, /) -> Tensor:
        """What is kept, of those entries of a parameter of that shape; shares their memory."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some rows of each parameter."""

    number: int
    """Of the process among those that hold shards, from 0."""
    count: int
    """Of those processes."""

    def cut(self, shape: torch.Size) -> slice:
        """As torch.chunk cuts the first dimension, and FSDP2 with it."""
        length = shape[0]
        size = -(-length // self.count)
        return slice(min(self.number * size, length), min((self.number + 1) * size, length))

    def part(self, rows: Tensor, _: torch.Size, /) -> Tensor:
        """All of them."""
        return rows


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Some elements of each parameter, in the order of memory."""

    number: int
    """Of the process, from 0."""
    count: int
    """Of processes."""

    def cut(self, shape: torch.Size) -> slice:
        """Rows in which there are any of them."""
        start, stop, width = self._ends(shape)
        return slice(start // width, -(-stop // width))

    def part(self, rows: Tensor, shape: torch.Size, /) -> Tensor:
        """As ZeRO-3 cuts the flat parameter; (elements,)."""
        start, stop, width = self._ends(shape)
        skipped = start // width * width
        return rows.reshape(-1)[start - skipped : stop - skipped]

    def _ends(self, shape: torch.Size) -> tuple[int, int, int]:
        """First element, the one after the last, and elements of a row."""
        numel = shape.numel()
        size = -(-numel // self.count)
        start, stop = (min(number * size, numel) for number in (self.number, self.number + 1))
        return start, stop, max(1, shape[1:].numel())


WHOLE = Shard(number=0, count=1)
"""Of a process that keeps everything."""


def kept(place: Place, whole: Tensor) -> Tensor:
    """What a place keeps of a parameter; memory of the whole."""
    rows = whole[place.cut(whole.shape)] if whole.ndim else whole
    return place.part(rows, whole.shape)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A network without memory, and what this process keeps of its weights."""

    model: nn.Module
    """On the meta device, but for its buffers."""
    rows: Rows
    """By name."""
