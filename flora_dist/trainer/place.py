# SPDX-License-Identifier: Apache-2.0
"""Which rows of a network's parameters a process keeps, and a network of which it keeps no more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

Rows = dict[str, Tensor]
"""This process's rows of each parameter, by name; whoever fills a network takes them out."""


class Unfit(RuntimeError):
    """A network that does not come to be parameter after parameter."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which rows of each parameter a process keeps."""

    number: int
    """Of the process among those that hold shards, from 0."""
    count: int
    """Of those processes."""

    def cut(self, length: int) -> slice:
        """As torch.chunk cuts the first dimension, and FSDP2 with it."""
        size = -(-length // self.count)
        return slice(min(self.number * size, length), min((self.number + 1) * size, length))

    def rows(self, whole: Tensor) -> Tensor:
        """This process's; memory of the whole."""
        return whole[self.cut(whole.shape[0])] if whole.ndim else whole


WHOLE = Place(number=0, count=1)
"""Of a process that keeps all rows."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A network without memory, and what this process keeps of its weights."""

    model: nn.Module
    """On the meta device, but for its buffers."""
    rows: Rows
    """By name."""
