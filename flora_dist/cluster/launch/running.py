# SPDX-License-Identifier: Apache-2.0
"""A job from its start to its end, whatever ends it: its own, a signal, a host that is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from types import FrameType

from flora_dist.cluster.launch.commands import HERE, LAUNCHERS, Commands, Job
from flora_dist.cluster.launch.files import kept
from flora_dist.cluster.launch.front import Front
from flora_dist.cluster.launch.near_end import GOODBYE_S, Session
from flora_dist.cluster.launch.outlet import pump
from flora_dist.cluster.launch.processes import end_with_parent
from flora_dist.cluster.launch.reaching import leave, opened, prepared

FOLLOW_S = 20.0
"""Seconds in which the other hosts end by themselves after the first has failed."""
_POLL_S = 0.1
_LOST = 1
_LAST_LINES_S = 1.0


def run(job: Job, launcher: str, *, grace_s: float) -> int:
    """Run a job to its end; its exit code, 128 + N after signal N, or 1 where a host is lost.

    ``grace_s``: seconds that workers have after a SIGTERM before they are killed.

    Raises:
        ValueError: a host that cannot be reached or cannot run the job; nothing has started then.
    """
    commands = LAUNCHERS[launcher](job)
    files = commands.files if commands.here else {}
    hosts = () if launcher == "slurm" else job.hosts
    with Front() as front, kept(job.folder(HERE), files), _Signals() as signals:
        if hosts and job.held_back:
            names = ", ".join(job.held_back)
            front.say(
                f"not sent to other hosts, since their names look like secrets: {names} (--export "
                "NAME sends one)."
            )
        sessions = [opened(host.name, job, commands, front) for host in hosts]
        try:
            prepared(sessions, job, commands, front, lambda: signals.count > 0)
            if signals.number:
                front.say(f"stopped by {signal.Signals(signals.number).name}; nothing has started.")
                code = 128 + signals.number
            else:
                code = _Watch(job, commands, sessions, signals, grace_s, front).to_the_end()
        finally:
            leave(sessions, job, front)
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


class _Watch:
    """The loop that watches what was started."""

    def __init__(
        self,
        job: Job,
        commands: Commands,
        sessions: list[Session],
        signals: _Signals,
        grace_s: float,
        front: Front,
    ) -> None:
        self._job, self._sessions, self._signals, self._grace_s = job, sessions, signals, grace_s
        self._front, self._pumps = front, list[Thread]()
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
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                # Where no agent watches (Slurm), srun would go on without a front door.
                preexec_fn=end_with_parent,
            )
            for stream, pipe in ((1, self._here.stdout), (2, self._here.stderr)):
                assert pipe is not None
                self._pumps.append(pump(pipe, partial(front.pass_on, stream)))
        folder = str(Path.cwd())
        self._commands = {
            session.host: session.begin(
                "run", folder=folder, command=list(commands.each[session.host])
            )
            for session in sessions
            if session.host in commands.each
        }

    def to_the_end(self) -> int:
        """Watch until nothing is left to wait for; the exit code."""
        while True:
            code = self._code()
            self._front.complain()
            if code is not None:
                return self._told(code)
            time.sleep(_POLL_S)

    def _code(self) -> int | None:
        lost = self._newly_lost()
        if lost and len(self._sessions) - len(self._lost) < self._job.least_hosts:
            self._front.say(
                f"host {', '.join(lost)} no longer answers: the job cannot go on without it."
            )
            self._ask_to_stop()
            self._stop_at = time.monotonic()
            return _LOST
        if lost:
            self._front.say(
                f"host {', '.join(lost)} no longer answers; the job is elastic and goes on."
            )
        if self._signals.number:
            return self._stopping()
        return self._ended()

    def _newly_lost(self) -> list[str]:
        """Hosts whose agent has gone although nobody told it to."""
        fresh = [
            session.host
            for session in self._sessions
            if not session.is_open and session.host not in self._lost
        ]
        self._lost.update(fresh)
        return fresh

    def _ended(self) -> int | None:
        """The code of the launcher here, or of those on the hosts."""
        if self._here is not None:
            code = self._here.poll()
            return None if code is None else _as_shell(code)
        codes = [self._code_of(host) for host in self._commands if host not in self._lost]
        failed = next((_as_shell(code) for code in codes if code), 0)
        if None not in codes:
            return failed
        if not failed or self._job.least_hosts < len(self._job.hosts):
            return None
        if self._stop_at is None:  # the others notice by themselves, and say what they lost
            self._stop_at = time.monotonic() + FOLLOW_S
        return failed if time.monotonic() > self._stop_at else None

    def _code_of(self, host: str) -> int | None:
        """That of the command there, once it has ended."""
        ended = self._commands[host]
        # An exception: the host is lost, which is noticed soon.
        return int(ended.result()) if ended.done() and not ended.exception() else None

    def _stopping(self) -> int | None:
        """After a signal: workers may save and end; those that do not are killed."""
        name = signal.Signals(self._signals.number).name
        if self._stop_at is None:
            self._front.say(
                f"{name}: workers have {self._grace_s:.0f} s to end; send it again to kill them."
            )
            self._ask_to_stop()
            self._stop_at = time.monotonic() + self._grace_s
        over = self._ended() is not None
        if over or self._signals.count > 1 or time.monotonic() > self._stop_at:
            self._front.say(f"stopped by {name}.")
            return 128 + self._signals.number
        return None

    def _ask_to_stop(self) -> None:
        for session in self._sessions:
            session.begin("stop")
        if self._stop:
            with suppress(OSError, subprocess.TimeoutExpired):  # they are killed after the grace
                subprocess.run(self._stop, check=False, timeout=GOODBYE_S, stdin=subprocess.DEVNULL)

    def _told(self, code: int) -> int:
        if self._here is not None and self._here.poll() is None:
            self._here.terminate()
            try:
                self._here.wait(GOODBYE_S)
            except subprocess.TimeoutExpired:
                self._here.kill()
        for thread in self._pumps:  # what the ranks left behind may hold it open
            thread.join(_LAST_LINES_S)
        if code and not self._signals.number and not self._lost:
            codes = {host: self._code_of(host) for host in self._commands}
            where = [f"{host} {_as_shell(code)}" for host, code in codes.items() if code]
            self._front.say(
                f"the job failed with exit code {code}"
                f"{' (' + ', '.join(where) + ')' if where else ''}; "
                "the first failure above says why."
            )
        return code


def _as_shell(code: int) -> int:
    """128 + N for signal N, as shells say it: a negative code would be cut to a byte."""
    return code if code >= 0 else 128 - code
