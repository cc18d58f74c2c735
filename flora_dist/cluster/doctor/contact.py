# SPDX-License-Identifier: Apache-2.0
"""Reach every host at once, and ask each for its facts; a host that fails becomes a finding."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from flora_dist.cluster.doctor.facts import HostFacts, from_tree
from flora_dist.cluster.doctor.survey import Asked, Finding, error, warning
from flora_dist.cluster.launch.hosts import address_of, is_local
from flora_dist.cluster.launch.near_end import Lost, Session, far_command
from flora_dist.cluster.launch.ssh import over_ssh

HELLO_S = 30.0
"""Seconds to the agent's first word: a login on a busy host and Python's start."""
FACTS_S = 60.0
_SSH_FAILED = 255


def resolved(asked: Asked) -> Iterator[Finding]:
    """Findings on the hosts whose names do not resolve here."""
    for host in asked.hosts:
        if not _resolves(host.name):
            yield error(
                "name", [host.name], f"the name {host.name} does not resolve here",
                "Correct the hostfile, /etc/hosts or DNS.",
            )  # fmt: skip


def _resolves(name: str) -> bool:
    try:
        address_of(name)
    except ValueError:
        return False
    return True


@contextmanager
def sessions(
    asked: Asked, names: Sequence[str]
) -> Iterator[tuple[dict[str, Session], list[Finding]]]:
    """Agents on these hosts, by name, and a finding for each host without; all end with it."""
    opened: list[Session] = []
    reached: dict[str, Session] = {}
    findings: list[Finding] = []
    try:
        with ThreadPoolExecutor(max_workers=max(1, len(names))) as pool:
            for found, trouble in pool.map(lambda name: _reach(asked, name, opened), names):
                findings += trouble
                if found is not None:
                    reached[found.host] = found
        yield reached, findings
    finally:
        with ThreadPoolExecutor(max_workers=max(1, len(opened))) as pool:
            list(pool.map(Session.close, opened))


def _reach(asked: Asked, name: str, opened: list[Session]) -> tuple[Session | None, list[Finding]]:
    """An agent there; one on this machine answers without ssh, but launchers will not do so."""
    is_here = is_local(name)
    if is_here and not asked.is_cluster:
        session, why = _start(asked, name, opened, ssh=False)
        return session, [why] if why else []
    session, why = _start(asked, name, opened, ssh=True)
    if why is None or why.subject != "ssh" or not is_here:
        return session, [why] if why else []
    refused = warning(
        "ssh", [name], f"{name} is this machine and cannot be reached by ssh from itself",
        "pdsh and mpirun need that: start sshd here and add your key to ~/.ssh/authorized_keys, "
        "or use --launcher torchrun.",
    )  # fmt: skip
    session, why = _start(asked, name, opened, ssh=False)
    return session, [refused, why] if why else [refused]


def _start(
    asked: Asked, name: str, opened: list[Session], *, ssh: bool
) -> tuple[Session | None, Finding | None]:
    agent = far_command(
        "flora_dist.cluster.doctor.agent", asked.python, asked.folder, asked.environment
    )
    command = over_ssh(name, agent) if ssh else agent
    session = Session(name, command, asked.environment, lambda _stream, _data: None)
    opened.append(session)
    try:
        session.hello(HELLO_S)
    except Lost as lost:
        return None, _why(asked, session, str(lost), ssh=ssh)
    return session, None


def _why(asked: Asked, session: Session, said: str, *, ssh: bool) -> Finding:
    """Ssh's own failures have code 255; others are the remote command's."""
    name = session.host
    if ssh and session.code() in {None, _SSH_FAILED}:
        remedy = next(
            (remedy for words, remedy in _SSH_REMEDIES if words in said.lower()),
            f"`ssh {name} true` must work without asking anything: look at what it prints.",
        )
        return error("ssh", [name], f"{name} cannot be reached by ssh: {said}", remedy)
    if "No module named" in said:
        return error(
            "installation", [name],
            f"{asked.python} on {name} has no flora_dist of this version: {said}",
            f"{asked.python} -m pip install flora-dist (on {name}), the version that is here.",
        )  # fmt: skip
    return error(
        "python", [name], f"{asked.python} cannot be started on {name}: {said}",
        "Install the same environment at the same path on every host, or name another by --python.",
    )  # fmt: skip


_SSH_REMEDIES = (
    ("refused", "Start sshd there (service ssh start), or open its port 22."),
    ("no route", "Is the host up and its cable in? Look at its console."),
    ("timed out", "Is the host up, and does the firewall let port 22 pass?"),
    ("not responding", "Is the host up and its cable in? Look at its console."),
    ("no answer", "Is the host up? It accepts a connection but does not answer."),
    ("permission denied", "Add your public key to its ~/.ssh/authorized_keys (ssh-copy-id)."),
    ("host key", "Check its key and add it to ~/.ssh/known_hosts (ssh-keyscan)."),
    ("resolve", "Correct the hostfile, /etc/hosts or DNS."),
)


def ask_facts(asked: Asked, reached: dict[str, Session]) -> tuple[list[HostFacts], list[Finding]]:
    """The facts of these hosts, and findings where one could not say them."""
    with ThreadPoolExecutor(max_workers=max(1, len(reached))) as pool:
        answers = list(pool.map(lambda session: _facts(asked, session), reached.values()))
    found = [answer for answer in answers if isinstance(answer, HostFacts)]
    return found, [answer for answer in answers if isinstance(answer, Finding)]


def _facts(asked: Asked, session: Session) -> HostFacts | Finding:
    began = time.time()
    what = {
        "name": session.host,
        "master": asked.master,
        "names": [host.name for host in asked.hosts] if asked.is_cluster else [],
        "config": asked.config,
        "mpi": asked.mpi,
        "folder": asked.folder,
    }
    try:
        tree = session.ask("facts", FACTS_S, **what)
        with suppress(TypeError, KeyError):
            facts = from_tree(tree)
            # Its clock was read while it looked: somewhere between.
            ended = time.time()
            return dataclasses.replace(
                facts,
                clock_ahead_s=facts.clock_ahead_s - (began + ended) / 2,
                clock_doubt_s=(ended - began) / 2,
            )
        said = "its answer has other fields"
    except Lost as lost:
        said = str(lost)
    return error(
        "installation", [session.host], f"{session.host} cannot report its facts: {said}",
        f"Install the same flora_dist on {session.host} as here.",
    )  # fmt: skip
