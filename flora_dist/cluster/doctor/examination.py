# SPDX-License-Identifier: Apache-2.0
"""The order in which things are looked at, and what is left out when something before is wrong."""

from __future__ import annotations

from dataclasses import replace

from flora_dist.cluster.doctor import contact
from flora_dist.cluster.doctor.facts import HostFacts
from flora_dist.cluster.doctor.findings import ON_FACTS, ON_LINKS, ON_RANKS, apply
from flora_dist.cluster.doctor.group import try_ranks
from flora_dist.cluster.doctor.reachability import ALL_PAIRS, reach
from flora_dist.cluster.doctor.survey import Asked, Finding, Survey
from flora_dist.cluster.launch.hosts import address_of
from flora_dist.cluster.launch.near_end import Session

# With one of these the ranks would only wait for each other until their timeout.
_HOPELESS = frozenset(("interface", "reach", "port"))


def examine(asked: Asked) -> Survey:
    """Look at everything; each step only at hosts that answered in the one before."""
    unknown = list(contact.resolved(asked))
    missing = {name for finding in unknown for name in finding.hosts}
    names = [host.name for host in asked.hosts if host.name not in missing]
    with contact.sessions(asked, names) as (reached, unreached):
        facts, silent = contact.ask_facts(asked, reached)
        survey = Survey(asked=asked, facts=tuple(facts), findings=(*unknown, *unreached, *silent))
        survey = _found(survey, apply(ON_FACTS, survey))
        told = {host.name: host for host in facts}
        reached = {name: session for name, session in reached.items() if name in told}
        survey = _look_at_links(survey, reached, told)
        return _look_at_ranks(survey, reached, told)


def _look_at_links(
    survey: Survey, reached: dict[str, Session], told: dict[str, HostFacts]
) -> Survey:
    asked = survey.asked
    if not reached or (asked.is_cluster and len(reached) == 1):
        return _noted(survey, "no links were tried: they need two hosts that answer")
    addresses = {
        name: found.address if (found := facts.interface()) else _address(asked, name)
        for name, facts in told.items()
    }
    links, ports = reach(asked, reached, addresses)
    survey = replace(survey, links=links, ports=ports)
    if len(reached) > ALL_PAIRS:
        note = f"more than {ALL_PAIRS} hosts: links were tried in a ring and with the first host"
        survey = _noted(survey, note)
    return _found(survey, apply(ON_LINKS, survey))


def _address(asked: Asked, name: str) -> str:
    return address_of(name) if asked.is_cluster else "127.0.0.1"


def _look_at_ranks(
    survey: Survey, reached: dict[str, Session], told: dict[str, HostFacts]
) -> Survey:
    asked = survey.asked
    if not asked.ranks:
        return _noted(survey, "no ranks were started (--quick)")
    absent = [host.name for host in asked.hosts if host.name not in reached]
    if absent:
        return _noted(survey, f"no ranks were started: a job needs {', '.join(absent)} too")
    hopeless = sorted(
        {each.subject for each in survey.findings if each.severity == "error"} & _HOPELESS
    )
    if hopeless:
        note = f"no ranks were started: they would wait for nothing ({', '.join(hopeless)})"
        return _noted(survey, note)
    survey = replace(survey, ranks=try_ranks(asked, reached, told))
    return _found(survey, apply(ON_RANKS, survey))


def _found(survey: Survey, more: tuple[Finding, ...]) -> Survey:
    return replace(survey, findings=(*survey.findings, *more))


def _noted(survey: Survey, note: str) -> Survey:
    return replace(survey, notes=(*survey.notes, note))
