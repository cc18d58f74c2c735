# SPDX-License-Identifier: Apache-2.0
"""Every host of a job is reached before anything starts, and left with nothing at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from flora_dist.cluster.launch.commands import Commands, Job
from flora_dist.cluster.launch.front import Front
from flora_dist.cluster.launch.hosts import is_local
from flora_dist.cluster.launch.locks import STALE_S, may_wait_for_locks
from flora_dist.cluster.launch.near_end import GOODBYE_S, Lost, Session, answer, far_command
from flora_dist.cluster.launch.ssh import over_ssh
from flora_dist.cluster.launch.worker import SECRETS
from flora_dist.version import __version__

READY_S = 40.0
"""Seconds in which every host must answer; ssh itself gives up after 10 to 20."""
_CLOSE_S = 1.0
"""Seconds for a far end that has nothing left to end, or does not answer."""
_POLL_S = 0.05


def opened(host: str, job: Job, commands: Commands, front: Front) -> Session:
    """A session to a host, just begun."""
    variables = {**job.variables, **commands.variables}
    agent = far_command(
        "flora_dist.cluster.launch.agent", sys.executable, str(Path.cwd()), variables
    )
    words = agent if is_local(host) else over_ssh(host, agent)
    return Session(host, words, variables, front.pass_on)


def prepared(
    sessions: Sequence[Session],
    job: Job,
    commands: Commands,
    front: Front,
    is_stopped: Callable[[], bool],
) -> None:
    """Return when every host has answered and can run the job, or when it is to stop.

    Raises:
        ValueError: one cannot, or has not answered in time.
    """
    deadline = time.monotonic() + READY_S
    if not _all_done([session.greeted for session in sessions], deadline, is_stopped):
        return
    for session in sorted(sessions, key=lambda session: not session.greeted.done()):
        _check_version(session)
    facts = {
        session.host: session.begin(
            "prepare",
            folder=str(Path.cwd()),
            files_folder=str(job.folder(session.host)),
            files=_files(commands, session.host),
        )
        for session in sessions
    }
    if not _all_done(facts.values(), deadline, is_stopped):
        return
    ordered = sorted(facts.items(), key=lambda each: not each[1].done())
    seen = {host: _ready(host, told)["locks"] for host, told in ordered}
    if may_wait_for_locks(job.program):
        _check_locks(seen, front)


def _files(commands: Commands, host: str) -> dict[str, str]:
    found = dict(commands.files) if host in commands.each else {}
    return found | ({SECRETS: json.dumps(dict(commands.secrets))} if commands.secrets else {})


def _all_done(
    wanted: Iterable[Future[Any]], deadline: float, is_stopped: Callable[[], bool]
) -> bool:
    """Wait until all are, one has failed or the time is over; False where the job is to stop."""
    pending = set(wanted)
    while pending and time.monotonic() < deadline:
        if is_stopped():
            return False
        done, pending = wait(pending, _POLL_S)
        if any(future.exception() for future in done):
            break
    return True


def _check_version(session: Session) -> None:
    try:
        version = session.hello(0.0)
    except Lost:
        said = session.last_words(3) or f"no answer within {READY_S:.0f} s"
        raise ValueError(
            f"every host must be reached by ssh without a question and run {sys.executable} with "
            f"flora_dist; {session.host} says: {said}. Try: ssh {session.host} {sys.executable} -c "
            "'import flora_dist'"
        ) from None
    if version != __version__:
        raise ValueError(
            f"every host must have the same flora_dist; {session.host} has {version}, this one "
            f"{__version__}. Install the same there."
        )


def _ready(host: str, told: Future[Any]) -> Mapping[str, Any]:
    try:
        facts: Mapping[str, Any] = answer(told, "prepare", 0.0)
    except Lost as lost:
        raise ValueError(
            f"every host must prepare its part of the job; {host} says: {lost}. Look at its load "
            "and at its folder for temporary files."
        ) from None
    if not facts["folder_exists"]:
        raise ValueError(
            f"a job runs in the same folder on every host; {host} has no {Path.cwd()}. Share or "
            "copy it, or start from a folder that all have."
        )
    return facts


def _check_locks(seen: Mapping[str, Sequence[Mapping[str, Any]]], front: Front) -> None:
    """Refuse locks that would hold every rank forever; warn of those that may.

    Raises:
        ValueError: one that is old and that no host of the job holds.
    """
    held = {lock["path"] for locks in seen.values() for lock in locks if lock["is_held"]}
    for host, lock in ((host, lock) for host, locks in seen.items() for lock in locks):
        if lock["path"] in held:
            continue
        words = f"{lock['path']}, {lock['age_s']:.0f} s old"
        remedy = f"{'' if is_local(host) else f'ssh {host} '}rm {lock['path']}"
        if lock["age_s"] >= STALE_S:
            raise ValueError(
                "a lock that no process holds must be removed, or every later job waits for it "
                f"forever and says nothing; a killed job has left {words} on {host}. Remove it: "
                f"{remedy}"
            )
        front.say(
            f"{host}: no process on a host of this job holds {words}; if no other host uses "
            f"it either: {remedy}"
        )


def leave(sessions: Sequence[Session], job: Job, front: Front) -> None:
    """Leave nothing of the job on any host that can be reached, and say where that failed."""
    greeted = [
        session
        for session in sessions
        if session.greeted.done() and not session.greeted.exception()
    ]
    unreached = _end([session.host for session in greeted], sessions)
    # A far end that was killed cannot answer: another one ends what is left.
    again = [opened(host, job, Commands(), front) for host in unreached]
    for host in _end(unreached, again):
        front.say(f"host {host} does not answer; what runs there ends by itself within 30 s.")


def _end(hosts: Sequence[str], sessions: Sequence[Session]) -> list[str]:
    """End the far ends; those of the hosts that did not answer."""
    asked = {session.host: session.begin("end") for session in sessions if session.host in hosts}
    ended = {
        host for host, future in asked.items() if future in wait(asked.values(), GOODBYE_S).done
    }
    for session in sessions:
        session.close(_CLOSE_S)
    return [host for host in hosts if host not in ended or asked[host].exception()]
