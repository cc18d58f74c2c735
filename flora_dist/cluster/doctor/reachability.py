# SPDX-License-Identifier: Apache-2.0
"""Let every pair of hosts connect to each other, both ways, and measure what lies between."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from flora_dist.cluster.doctor.links import Connection
from flora_dist.cluster.doctor.rules_network import slow_links
from flora_dist.cluster.doctor.survey import Asked, Link, Port, Survey
from flora_dist.cluster.launch.near_end import Lost, Session

ALL_PAIRS = 16
"""Hosts up to which every pair is tried; beyond, a ring and each host with the first."""
_CONNECT_S = 3.5
"""Seconds for a connection: a lost first packet is sent again after 1 and 3."""
_MEASURE_S = 90.0
_AGAIN = 4
"""More measurements of a link that seems slow: a busy moment passes."""

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    session: Session
    address: str
    port: int


def pairs(names: Sequence[str]) -> list[Pair]:
    """The pairs that are tried: all, or a ring and a star.

    >>> pairs(["a", "b", "c"])
    [('a', 'b'), ('a', 'c'), ('b', 'c')]
    >>> len(pairs([str(number) for number in range(100)]))
    198
    """
    if len(names) <= ALL_PAIRS:
        return list(combinations(names, 2))
    ring = list(pairwise(names[1:]))
    return [(names[0], name) for name in names[1:]] + ring + [(names[-1], names[1])]


def rounds(wanted: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs that do not share a host, side by side: links are measured undisturbed.

    >>> rounds([("a", "b"), ("c", "d"), ("a", "c")])
    [[('a', 'b'), ('c', 'd')], [('a', 'c')]]
    """
    found: list[list[Pair]] = []
    for pair in wanted:
        for together in found:
            if not any(set(pair) & set(other) for other in together):
                together.append(pair)
                break
        else:
            found.append([pair])
    return found


def reach(
    asked: Asked, reached: Mapping[str, Session], addresses: Mapping[str, str]
) -> tuple[tuple[Link, ...], tuple[Port, ...]]:
    """Both directions of each pair, process 0's port, and ports that could not be opened.

    Args:
        asked: the job.
        reached: the hosts that answer.
        addresses: by which the others reach each of them.
    """
    token = secrets.token_hex(16)
    ends, master, troubles = _listen(asked, reached, addresses, token)
    try:
        links: list[Link] = []
        for together in rounds(pairs(list(ends))):
            links += _side_by_side(ends, together, token, bandwidth=True)
            back = [(target, source) for source, target in together]
            links += _side_by_side(ends, back, token, bandwidth=False)
        if master is not None:
            first = next(iter(ends))
            ports = {**ends, first: master}
            star = [(name, first) for name in ends if name != first]
            links += _side_by_side(ports, star, token, bandwidth=False)
        links = _measure_again(asked, ends, links, token)
    finally:
        _together(list(reached.values()), "close")
    return tuple(links), troubles


def _listen(
    asked: Asked, reached: Mapping[str, Session], addresses: Mapping[str, str], token: str
) -> tuple[dict[str, _End], _End | None, tuple[Port, ...]]:
    """A port on each host, and process 0's on the first."""
    first = asked.hosts[0].name
    at = "" if asked.is_cluster else asked.master
    ends: dict[str, _End] = {}
    master: _End | None = None
    troubles: list[Port] = []
    for name, session in reached.items():
        wanted = [0, asked.port] if name == first else [0]
        try:
            got = session.ask("listen", _MEASURE_S, address=at, ports=wanted, token=token)
        except Lost as lost:
            got = [str(lost)]
        for number, port in zip(wanted, got, strict=False):
            if isinstance(port, str):
                troubles.append(Port(host=name, port=number, trouble=port))
            elif number == 0:
                ends[name] = _End(session=session, address=addresses[name], port=port)
            else:
                master = _End(session=session, address=asked.master, port=port)
    return ends, master, tuple(troubles)


def _side_by_side(
    ends: Mapping[str, _End], together: Sequence[Pair], token: str, *, bandwidth: bool
) -> list[Link]:
    def one(pair: Pair) -> Link:
        source, target = ends[pair[0]], ends[pair[1]]
        what = {"address": target.address, "port": target.port, "token": token}
        try:
            measured = Connection(
                **source.session.ask(
                    "measure", _MEASURE_S, limit_s=_CONNECT_S, bandwidth=bandwidth, **what
                )
            )
        except Lost as lost:
            measured = Connection(trouble=str(lost))
        return Link(
            source=pair[0], target=pair[1],
            address=target.address, port=target.port, measured=measured,
        )  # fmt: skip

    with ThreadPoolExecutor(max_workers=max(1, len(together))) as pool:
        return list(pool.map(one, together))


def _measure_again(
    asked: Asked, ends: Mapping[str, _End], links: list[Link], token: str
) -> list[Link]:
    """The best of several for links that seem slow."""
    for _ in range(_AGAIN):
        slow = slow_links(Survey(asked=asked, links=tuple(links)))
        better = {}
        for together in rounds((link.source, link.target) for link in slow):
            for link in _side_by_side(ends, together, token, bandwidth=True):
                better[link.source, link.target] = link.measured
        links = [
            replace(link, measured=_best(link.measured, better[link.source, link.target]))
            if link in slow and better[link.source, link.target].trouble is None
            else link
            for link in links
        ]
    return links


def _best(one: Connection, other: Connection) -> Connection:
    assert one.there_mbit is not None
    assert one.back_mbit is not None
    return replace(
        one,
        there_mbit=max(one.there_mbit, other.there_mbit or 0.0),
        back_mbit=max(one.back_mbit, other.back_mbit or 0.0),
    )


def _together(all_sessions: Sequence[Session], ask: str) -> None:
    def one(session: Session) -> None:
        with suppress(Lost):  # it has gone: the next question says so
            session.ask(ask, _CONNECT_S)

    with ThreadPoolExecutor(max_workers=max(1, len(all_sessions))) as pool:
        list(pool.map(one, all_sessions))
