# SPDX-License-Identifier: Apache-2.0
"""Start every host's ranks, wait for what they say, and end all soon after one has failed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress

from flora_dist.cluster.doctor.facts import HostFacts
from flora_dist.cluster.doctor.survey import LOST, Asked, RankSaid
from flora_dist.cluster.launch.near_end import Lost, Session

_IMPORT_S = 90.0
"""Seconds to load torch on a busy host from a cold disk, beside the group's own timeout."""
_ANSWER_S = 15.0
_GRACE_S = 1.5
"""Seconds in which other hosts' ranks may fail by themselves and say why."""
_MODULE = "flora_dist.cluster.doctor.ranks"


def try_ranks(
    asked: Asked, reached: Mapping[str, Session], facts: Mapping[str, HostFacts]
) -> tuple[RankSaid, ...]:
    """What every rank of the job came to, in order of ranks."""
    first, numbers = 0, {}
    for host in asked.hosts:
        numbers[host.name] = list(range(first, first + host.slots))
        first += host.slots
    place = {
        "WORLD_SIZE": str(first),
        "MASTER_ADDR": asked.master,
        "MASTER_PORT": str(asked.port),
    }
    device = "cuda" if all(facts[host.name].gpus for host in asked.hosts) else "cpu"

    def run(session: Session) -> list[RankSaid]:
        settings = {
            "device": device,
            "timeout_s": asked.timeout_s,
            "seed": _seed(asked, facts[session.host]),
        }
        limit_s = asked.timeout_s + _IMPORT_S
        own = numbers[session.host]
        try:
            said = session.ask(
                "ranks", limit_s + _ANSWER_S,
                ranks=own, environment=place, limit_s=limit_s,
                program=["-m", _MODULE, json.dumps(settings)],
            )  # fmt: skip
        except Lost as lost:
            return [_lost(session.host, rank, str(lost)) for rank in own]
        return [RankSaid(host=session.host, **each) for each in said]

    with ThreadPoolExecutor(max_workers=len(reached)) as pool:
        futures = {pool.submit(run, session): session for session in reached.values()}
        _end_after_a_failure(futures)
        found = [said for future in futures for said in future.result()]
    return tuple(sorted(found, key=lambda said: said.process_rank))


def _end_after_a_failure(running: Mapping[Future[list[RankSaid]], Session]) -> None:
    pending = set(running)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        if all(said.result is not None for future in done for said in future.result()):
            continue
        time.sleep(_GRACE_S)
        for future in pending:
            with suppress(Lost):
                running[future].ask("stop", _ANSWER_S)
        return


def _lost(host: str, process_rank: int, why: str) -> RankSaid:
    return RankSaid(
        host=host, process_rank=process_rank, code=None, stage=LOST, result=None, error=why
    )


def _seed(asked: Asked, facts: HostFacts) -> int:
    """The one asked for, else the config's on that host, else 0."""
    if asked.seed is not None:
        return asked.seed
    seeds = facts.config.seeds if facts.config is not None else {}
    text = next(iter(seeds.values()), "0")
    return int(text) if text.lstrip("-").isdecimal() else 0
