# SPDX-License-Identifier: Apache-2.0
"""Terms of many parameters packed in one flat message, summed, and handed back.

Ranks agree on the layout of a message without a word: parameters of one kind stand together, kinds
and parameters in the order of their names. Rows that only a few ranks share travel between those,
so that bytes do not grow with the number of ranks, but where many share a row.

Shape suffixes: P parameters of a batch, S numbers of a message.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from flora_dist.core.protocols import WHOLE_ROWS, Reducer, Terms
from flora_dist.core.tiles import Cuts


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Parameters of one kind whose terms come together: the first dim of each term is P of them."""

    kind: Hashable
    """Equal for the same parameters on all ranks, whoever sends them together."""
    names: tuple[str, ...]
    """Of the parameters, ascending."""
    cuts: Cuts
    """Of each parameter."""
    sends_all: bool
    """False: no rank shares these matrices; only whether there is a gradient travels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A stretch of a message: one term of parameters that follow each other."""

    sender: int
    term: str
    first: int
    """Place of the first parameter among the sender's."""
    count: int


_Names: TypeAlias = tuple[tuple[str, ...], ...]


class Message:
    """Sums terms over the ranks of a reducer; its layout is found once and kept."""

    def __init__(self, senders: Sequence[Sender], reducer: Reducer) -> None:
        """``senders``: in any order; every parameter of the reducer's ranks belongs to one."""
        self._senders, self._reducer = senders, reducer
        self._runs: dict[_Names, list[_Run]] = {}
        self._places: dict[_Names, dict[int, Tensor]] = {}

    def bind(self, terms: Sequence[Terms]) -> Callable[[], None]:
        """Replaces what everyone sums by the sums, through one message, as often as it is called.

        Args:
            terms: of each sender, contiguous; names, order and shapes equal on all ranks, but for
                the shapes of terms that are exchanged.
        """
        common = [_common(*pair) for pair in zip(self._senders, terms, strict=True)]
        return self._bound(common, self._reducer.sum_)

    def exchange_(self, terms: Sequence[Terms]) -> None:
        """Make cut rows whole that a few ranks share; nothing is sent where there are none."""
        shared = [
            {
                name: own[name]
                for name in WHOLE_ROWS
                if name in own and sender.cuts.peers is not None
            }
            for sender, own in zip(self._senders, terms, strict=True)
        ]
        self._bound(shared, lambda message_S: self._swap_(message_S, shared))()

    def _bound(self, terms: Sequence[Terms], send: Callable[[Tensor], None]) -> Callable[[], None]:
        """Packs terms into one message, lets it be summed in place, unpacks; none of nothing."""
        names = tuple(tuple(own) for own in terms)
        if names not in self._runs:
            self._runs[names] = _lay_out(self._senders, names)
        runs = self._runs[names]
        parts = [_part(self._senders, terms, run) for run in runs]
        sizes = [len(part) for part in parts]

        def through() -> None:
            if not parts:
                return
            message_S = torch.cat(_alike(parts))
            send(message_S)
            torch._foreach_copy_(parts, torch.split(message_S, sizes))

        return through

    def _swap_(self, message_S: Tensor, terms: Sequence[Terms]) -> None:
        """Add what peers hold of the same rows, in the order of ranks: equal bits."""
        names = tuple(tuple(own) for own in terms)
        if names not in self._places:
            places = _shared_places(self._senders, terms, self._runs[names])
            self._places[names] = {
                peer: torch.tensor(places[peer], device=message_S.device) for peer in sorted(places)
            }
        indices, reducer = self._places[names], self._reducer
        sizes = {peer: len(index) for peer, index in indices.items()}
        sent_S = torch.cat([message_S[:0], *(message_S[index] for index in indices.values())])
        received = torch.split(reducer.exchange(sent_S, sizes), [*sizes.values()])
        theirs = dict(zip(indices, received, strict=True))
        own_S = message_S.clone()
        message_S.zero_()
        for rank in sorted([*indices, reducer.rank]):
            if rank == reducer.rank:
                message_S += own_S
            else:
                message_S.index_add_(0, indices[rank], theirs[rank])


def exchange_rows_(terms: Sequence[Terms], message: Message | None) -> None:
    """Make cut rows whole that a few ranks share; None: no other rank holds anything."""
    if message is not None:
        message.exchange_(terms)


def summing(terms: Sequence[Terms], message: Message | None) -> Callable[[], None]:
    """Replaces terms by their sums over ranks, which they are if no other rank holds anything."""
    return message.bind(terms) if message is not None else lambda: None


def _common(sender: Sender, terms: Terms) -> Terms:
    """What of a sender's terms everyone sums."""
    if not sender.sends_all:
        return {name: value for name, value in terms.items() if name == "presence"}
    if sender.cuts.peers is None:
        return terms
    return {name: value for name, value in terms.items() if name not in WHOLE_ROWS}


def _lay_out(senders: Sequence[Sender], names: _Names) -> list[_Run]:
    """The order of a message: kinds, their terms, their parameters; stretches of one sender."""
    kinds: dict[Hashable, list[int]] = {}
    for index, sender in enumerate(senders):
        if names[index]:
            kinds.setdefault(sender.kind, []).append(index)
    runs: list[_Run] = []
    for indices in sorted(kinds.values(), key=lambda own: min(senders[i].names[0] for i in own)):
        ordered = sorted(
            (name, index, place)
            for index in indices
            for place, name in enumerate(senders[index].names)
        )
        for term in names[indices[0]]:
            for _, index, place in ordered:
                last = runs[-1] if runs else None
                if last is not None and (last.sender, last.term) == (index, term):
                    runs[-1] = _Run(sender=index, term=term, first=last.first, count=last.count + 1)
                else:
                    runs.append(_Run(sender=index, term=term, first=place, count=1))
    return runs


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """All in one dtype on one device: the widest, which loses nothing, and the first one's."""
    first = parts[0]
    dtypes, devices = {part.dtype for part in parts}, {part.device for part in parts}
    if dtypes == {torch.float32} and len(devices) == 1:  # nearly always; to() asks each again
        return parts
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    return [part.to(device=first.device, dtype=dtype) for part in parts]


def _part(senders: Sequence[Sender], terms: Sequence[Terms], run: _Run) -> Tensor:
    """The numbers of a stretch."""
    value, count = terms[run.sender][run.term], len(senders[run.sender].names)
    if run.count < count:
        each = value.shape[0] // count
        value = value[run.first * each : (run.first + run.count) * each]
    return value.view(-1)  # not a copy: sums come back here


def _shared_places(
    senders: Sequence[Sender], terms: Sequence[Terms], runs: Sequence[_Run]
) -> dict[int, list[int]]:
    """For each peer, the numbers of the message that it shares, in an order both sides have."""
    places: dict[int, list[int]] = {}
    start = 0
    for run in runs:
        cuts, numbers = senders[run.sender].cuts, _part(senders, terms, run).numel()
        # Parameters with cuts of their own are never sent together with others.
        width = numbers // max(1, len(cuts.rows) * run.count)
        for peer in cuts.peers or ():
            shared = places.setdefault(peer.rank, [])
            for slot in peer.rows:
                first = start + slot * width
                shared.extend(range(first, first + width))
        start += numbers
    return {peer: shared for peer, shared in places.items() if shared}
