# SPDX-License-Identifier: Apache-2.0
"""Rules on what the ranks came to."""

from __future__ import annotations

from collections.abc import Iterator

from flora_dist.cluster.doctor.survey import LOST, Finding, RankSaid, Survey, error, groups

_BEFORE_THE_GROUP = frozenset(("not started", "started"))


def ranks_came(survey: Survey) -> Iterator[Finding]:
    """Those that ended by themselves are the cause; else those that came least far."""
    missing = [rank for rank in survey.ranks if rank.result is None]
    if not missing:
        return
    lost = [rank for rank in missing if rank.stage == LOST]
    failed = [rank for rank in missing if rank.code not in {None, 0}]
    # One that never joined makes those fail that waited for it.
    early = [rank for rank in failed if rank.stage in _BEFORE_THE_GROUP]
    for rank in lost or early or failed or missing:
        said = rank.error or "it said nothing"
        yield error("rank", [rank.host], f"{_name(rank)} {_end(rank)}: {said}", _remedy(rank))


def _end(rank: RankSaid) -> str:
    if rank.stage == LOST:
        return "is lost with its host"
    ended = "did not finish in time" if rank.code is None else f"ended with code {rank.code}"
    return f"{ended} at the stage {rank.stage!r}"


def _remedy(rank: RankSaid) -> str:
    killed_by = -(rank.code or 0)
    if killed_by > 0:
        return f"Signal {killed_by} ended it: look at dmesg on {rank.host} (out of memory?)."
    if rank.stage == LOST:
        return f"Check that {rank.host} and its network are up: it answered before."
    if rank.stage in _BEFORE_THE_GROUP:
        return f"Repair the installation on {rank.host}: torch or flora_dist cannot be imported."
    return (
        f"Repair on {rank.host} what the message says; if it waited for others, look at the "
        "findings on interfaces and ports, or give more time with --timeout."
    )


def sum_is_right(survey: Survey) -> Iterator[Finding]:
    """An all-reduce with a known answer."""
    for rank in survey.ranks:
        if rank.result is not None and rank.result["wrong_sum"] is not None:
            yield error(
                "all-reduce", [rank.host],
                f"the all-reduce is wrong at {_name(rank)}: {rank.result['wrong_sum']}",
                "Do not trust any result of this job. Look at the memory and network card of "
                f"{rank.host}, and at libraries that replace torch's collectives.",
            )  # fmt: skip


def projections_agree(survey: Survey) -> Iterator[Finding]:
    """The same seed must give the same bits on every rank and device."""
    seeds = {rank.result["seed"] for rank in survey.ranks if rank.result is not None}
    for seed in sorted(seeds):
        digests = {
            f"{_name(rank)} ({device})": digest
            for rank in survey.ranks
            if rank.result is not None and rank.result["seed"] == seed
            for device, digest in rank.result["projection"].items()
        }
        if differ := groups(digests):
            words, few = differ
            named = {each.rpartition(" (")[0] for each in few}
            hosts = {rank.host for rank in survey.ranks if _name(rank) in named}
            yield error(
                "projection", sorted(hosts),
                f"the bits of a projection differ: {words}",
                "Sketches of these ranks cannot be added: install the same flora_dist and torch "
                "there, and look for patches of either (sitecustomize, PYTHONPATH).",
            )  # fmt: skip


def ranks_load_the_same(survey: Survey) -> Iterator[Finding]:
    """What is imported in the end, PYTHONPATH and all."""
    for key, subject in (("torch", "package"), ("nccl", "nccl")):
        values = {
            _name(rank): str(rank.result[key]) for rank in survey.ranks if rank.result is not None
        }
        if differ := groups(values):
            words, few = differ
            hosts = {rank.host for rank in survey.ranks if _name(rank) in few}
            yield error(
                subject, sorted(hosts), f"the ranks' {key} differs: {words}",
                "Give every host the same environment (PYTHONPATH, virtual environment, GPUs).",
            )  # fmt: skip


def _name(rank: RankSaid) -> str:
    return f"rank {rank.process_rank} on {rank.host}"
