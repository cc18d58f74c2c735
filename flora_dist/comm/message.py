# SPDX-License-Identifier: Apache-2.0
"""Terms of many parameters packed in one flat message, summed, and handed back.

The layout of a message is the order of the terms given, which callers derive from parameter names:
ranks agree on it without a word. Terms of cut rows and blocks that only a few ranks share travel
between those, so that no rank's bytes grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flora_dist.optim.part import SLOTTED, Reducer, Terms
from flora_dist.tiles import Cuts, Peer


def sum_terms(terms: Sequence[Terms], cuts: Sequence[Cuts], reducer: Reducer | None) -> list[Terms]:
    """Sum terms over the ranks of ``reducer``: a message, and an exchange where cuts have peers.

    Args:
        terms: one dict per parameter; names and order equal on all ranks, shapes too but for
            those of terms that are exchanged.
        cuts: of each parameter.
        reducer: who holds the other parts; None: nobody, the terms are the sums.

    Returns:
        The sums, with the names, shapes, dtypes and devices of ``terms``.
    """
    if reducer is None:
        return [dict(parameter) for parameter in terms]
    shared: list[Terms] = []
    common: list[Terms] = []
    for parameter, cut in zip(terms, cuts, strict=True):
        names = SLOTTED if cut.peers is not None else ()
        shared.append({name: value for name, value in parameter.items() if name in names})
        common.append({name: value for name, value in parameter.items() if name not in names})
    everywhere = _through(common, reducer.sum_)
    among_peers = _through(shared, lambda message_S: _swap_(message_S, shared, cuts, reducer))
    return [{**one, **other} for one, other in zip(everywhere, among_peers, strict=True)]


def _through(terms: Sequence[Terms], send: Callable[[Tensor], None]) -> list[Terms]:
    """Pack terms into one message, let it be summed in place, unpack; no message of nothing."""
    values = [value for parameter in terms for value in parameter.values()]
    if not values:
        return [dict(parameter) for parameter in terms]
    # Parameters of several dtypes share the message: the widest loses nothing.
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    device = values[0].device
    message_S = torch.cat([value.reshape(-1).to(device=device, dtype=dtype) for value in values])
    send(message_S)
    sums, start = [], 0
    for parameter in terms:
        total: dict[str, Tensor] = {}
        for name, value in parameter.items():
            stop = start + math.prod(value.shape)
            total[name] = message_S[start:stop].view(value.shape).to(value)
            start = stop
        sums.append(total)
    return sums


def _swap_(
    message_S: Tensor, terms: Sequence[Terms], cuts: Sequence[Cuts], reducer: Reducer
) -> None:
    """Add what peers hold of the same rows and blocks, in the order of ranks: equal bits."""
    places = _places(terms, cuts)
    indices = {peer: torch.tensor(places[peer], device=message_S.device) for peer in sorted(places)}
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


def _places(terms: Sequence[Terms], cuts: Sequence[Cuts]) -> dict[int, list[int]]:
    """For each peer, the numbers of the message that it shares, in an order both sides have."""
    places: dict[int, list[int]] = {}
    start = 0
    for parameter, cut in zip(terms, cuts, strict=True):
        for name, value in parameter.items():
            width = math.prod(value.shape[1:])
            for peer in cut.peers or ():
                shared = places.setdefault(peer.rank, [])
                for slot in _slots(peer, name):
                    first = start + slot * width
                    shared.extend(range(first, first + width))
            start += value.numel()
    return {peer: shared for peer, shared in places.items() if shared}


def _slots(peer: Peer, name: str) -> tuple[int, ...]:
    return peer.rows if name == "rows" else peer.blocks
