# SPDX-License-Identifier: Apache-2.0
"""A job from its start to its end, whatever ends it: its own, a signal, a host that is lost."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from flora_dist.launch.agent import Task
from flora_dist.launch.commands import HERE, LAUNCHERS, Commands, Job
from flora_dist.launch.files import kept
from flora_dist.launch.link import Link
from flora_dist.launch.locks import STALE_S
from flora_dist.version import __version__

READY_S = 40.0
"""Seconds in which every host must answer; ssh itself gives up after 10 to 20."""
FOLLOW_S = 20.0
"""Seconds in which the other hosts end by themselves after the first has failed."""
END_S = 10.0
"""Seconds in which an agent must have ended its host's processes."""
_POLL_S = 0.1
_LOST = 1


def run(job: Job, launcher: str, *, grace_s: float) -> int:
    """Run a job to its end; its exit code, 128 + N after signal N, or 1 where a host is lost.

    ``grace_s``: seconds that workers have after a SIGTERM before they are killed.

    Raises:
        ValueError: a host that cannot be reached or cannot run the job; nothing has started then.
    """
    commands = LAUNCHERS[launcher](job)
    files = commands.files if commands.here else {}
    with kept(job.folder(HERE), files), _Signals() as signals:
        uses_ssh = launcher != "slurm"
        links = [Link(host.name, _task(job, commands, host.name)) for host in job.hosts if uses_ssh]
        try:
            _wait_until_ready(links, signals)
            if signals.number:
                say(f"stopped by {signal.Signals(signals.number).name}; nothing has started.")
                code = 128 + signals.number
            else:
                code = _Run(job, commands, links, signals, grace_s).to_the_end()
        finally:
            _close(links, job)
        return code


class _Signals:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted; the second one no longer waits."""

    def __init__(self) -> None:
        self.number = 0
        self.count = 0

    def __enter__(self) -> _Signals:
        self._before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1


class _Run:
    """The loop that watches what was started."""

    def __init__(
        self, job: Job, commands: Commands, links: list[Link], signals: _Signals, grace_s: float
    ) -> None:
        self._job, self._links, self._signals, self._grace_s = job, links, signals, grace_s
        self._stop = commands.stop
        self._lost: set[str] = set()
        self._stop_at: float | None = None
        self._here: subprocess.Popen[bytes] | None = None
        if commands.here:
            variables = {**job.variables, **commands.variables}
            self._here = subprocess.Popen(
                commands.here,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # Where no agent watches (Slurm), srun would go on without a front door.
                preexec_fn=_end_with_parent,
            )
        for link in links:
            link.say("start")

    def to_the_end(self) -> int:
        """Watch until nothing is left to wait for; the exit code."""
        while True:
            code = self._code()
            if code is not None:
                return self._told(code)
            time.sleep(_POLL_S)

    def _code(self) -> int | None:
        lost = self._newly_lost()
        if lost and len(self._links) - len(self._lost) < self._job.least_hosts:
            say(f"host {', '.join(lost)} no longer answers: the job cannot go on without it.")
            self._ask_to_stop()
            self._stop_at = time.monotonic()
            return _LOST
        if lost:
            say(f"host {', '.join(lost)} no longer answers; the job is elastic and goes on.")
        if self._signals.number:
            return self._stopping()
        return self._ended()

    def _newly_lost(self) -> list[str]:
        """Hosts whose agent has gone although nobody told it to."""
        fresh = [
            link.host for link in self._links if not link.is_open and link.host not in self._lost
        ]
        self._lost.update(fresh)
        return fresh

    def _ended(self) -> int | None:
        """The code of the launcher here, or of those on the hosts."""
        if self._here is not None:
            code = self._here.poll()
            return None if code is None else _as_shell(code)
        codes = [link.ended for link in self._links if link.host not in self._lost]
        failed = next((_as_shell(code) for code in codes if code), 0)
        if None not in codes:
            return failed
        if not failed or self._job.least_hosts < len(self._job.hosts):
            return None
        if self._stop_at is None:  # the others notice by themselves, and say what they lost
            self._stop_at = time.monotonic() + FOLLOW_S
        return failed if time.monotonic() > self._stop_at else None

    def _stopping(self) -> int | None:
        """After a signal: workers may save and end; those that do not are killed."""
        name = signal.Signals(self._signals.number).name
        if self._stop_at is None:
            say(f"{name}: workers have {self._grace_s:.0f} s to end; once more to kill them.")
            self._ask_to_stop()
            self._stop_at = time.monotonic() + self._grace_s
        over = self._ended() is not None
        if over or self._signals.count > 1 or time.monotonic() > self._stop_at:
            say(f"stopped by {name}.")
            return 128 + self._signals.number
        return None

    def _ask_to_stop(self) -> None:
        for link in self._links:
            link.say("stop")
        if self._stop:
            with suppress(OSError, subprocess.TimeoutExpired):  # they are killed after the grace
                subprocess.run(self._stop, check=False, timeout=END_S, stdin=subprocess.DEVNULL)

    def _told(self, code: int) -> int:
        if self._here is not None and self._here.poll() is None:
            self._here.terminate()
            try:
                self._here.wait(END_S)
            except subprocess.TimeoutExpired:
                self._here.kill()
        if code and not self._signals.number and not self._lost:
            where = [f"{x.host} {_as_shell(x.ended)}" for x in self._links if x.ended]
            say(
                f"the job failed with exit code {code}"
                f"{' (' + ', '.join(where) + ')' if where else ''}; "
                "the first failure above says why."
            )
        return code


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _as_shell(code: int) -> int:
    """128 + N for signal N, as shells say it: a negative code would be cut to a byte."""
    return code if code >= 0 else 128 - code


def _task(job: Job, commands: Commands, host: str) -> Task:
    command = commands.each.get(host)
    return Task(
        job=job.name,
        folder=str(Path.cwd()),
        environment={**job.variables, **commands.variables},
        command=list(command) if command else None,
        files_folder=str(job.folder(host)),
        files=dict(commands.files) if command else {},
    )


def _wait_until_ready(links: list[Link], signals: _Signals) -> None:
    """Return when every host has answered and can run the job, or at a signal.

    Raises:
        ValueError: one cannot, or has not answered in time.
    """
    deadline = time.monotonic() + READY_S
    for link in links:
        while link.ready is None and link.is_open and time.monotonic() < deadline:
            if signals.number:
                return
            time.sleep(0.01)
        _check(link)
    _check_locks(links)


def _check(link: Link) -> None:
    facts: dict[str, Any] | None = link.ready
    if facts is None:
        time.sleep(0.2)  # ssh's words may be behind its end
        said = "; ".join(filter(None, link.trouble)) or f"no answer within {READY_S:.0f} s"
        raise ValueError(
            f"every host must be reached by ssh without a question and run {sys.executable} with "
            f"flora_dist; {link.host} says: {said}. Try: ssh {link.host} {sys.executable} -c "
            "'import flora_dist'"
        )
    if facts["version"] != __version__:
        raise ValueError(
            f"every host must have the same flora_dist; {link.host} has {facts['version']}, this "
            f"one {__version__}. Install the same there."
        )
    if not facts["folder_exists"]:
        raise ValueError(
            f"a job runs in the same folder on every host; {link.host} has no {Path.cwd()}. Share "
            "or copy it, or start from a folder that all have."
        )


def _check_locks(links: list[Link]) -> None:
    """Refuse locks that would hold every rank for ever; tell of those that may.

    Raises:
        ValueError: one that is old and that no host of the job holds.
    """
    seen = [(link, lock) for link in links if link.ready for lock in link.ready["locks"]]
    held = {lock["path"] for _, lock in seen if lock["is_held"]}
    for link, lock in seen:
        if lock["path"] in held:
            continue
        words = f"{lock['path']}, {lock['age_s']:.0f} s old"
        remedy = f"ssh {link.host} rm {lock['path']}"
        if lock["age_s"] >= STALE_S:
            raise ValueError(
                "a killed job has left a lock for which every later one waits without a word; on "
                f"{link.host} nobody holds {words}. Remove it: {remedy}"
            )
        say(f"{link.host}: no host of this job holds {words}; if none does: {remedy}")


def _close(links: list[Link], job: Job) -> None:
    """Leave nothing of the job on any host that can be reached, and say what was left."""
    for link in links:
        link.say("end")
    unreached = [link.host for link in links if link.ready is not None and not link.close(END_S)]
    again = {host: Link(host, _sweep(job)) for host in unreached}
    for host, link in again.items():
        deadline = time.monotonic() + END_S
        while link.ready is None and link.is_open and time.monotonic() < deadline:
            time.sleep(0.05)
        if not link.close(END_S):
            say(f"host {host} does not answer; what runs there ends by itself within 30 s.")


def _sweep(job: Job) -> Task:
    """For a host whose agent was killed: another one, which only ends what is left."""
    return Task(job=job.name, folder="/", environment={}, command=None, files_folder="", files={})


def say(text: str) -> None:
    """A line of the front door's own."""
    sys.stderr.write(f"flora-dist launch: {text}\n")
    sys.stderr.flush()
