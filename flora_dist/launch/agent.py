# SPDX-License-Identifier: Apache-2.0
"""One for each host of a job: runs what is to run there, and leaves nothing of it behind.

Its input is the link to the front door: a line of JSON that says what to do, then a line every few
seconds. Where the link falls silent or ends, by whatever cause, the host ends its part of the job:
a host behind a pulled cable would compute for ever otherwise. Its output is that of the command,
between lines of its own that begin with `SAYS`. Standard library only: it starts in a tenth of a
second.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flora_dist.launch.files import kept
from flora_dist.launch.locks import locks
from flora_dist.launch.processes import end_all, of_job, signal_each, workers
from flora_dist.version import __version__

SAYS = "::flora-agent:: "
BEAT_S = 5.0
"""Seconds between the front door's lines."""
SILENCE_S = 30.0
"""Seconds without one after which the link is lost."""
_PATIENCE_S = 3.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a host is told in the first line."""

    job: str
    """The mark of the job's processes."""
    folder: str
    environment: dict[str, str]
    """Laid over the host's own."""
    command: list[str] | None
    """What to run there; None where a launcher of another kind starts it, and only the end of its
    processes is the agent's."""
    files_folder: str
    files: dict[str, str]
    """Texts the command reads there, by name."""


class _Link:
    """The front door's lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._heard = time.monotonic()
        self.lost = False

    def words(self, wait_s: float) -> list[str]:
        """The lines that have come, after at most ``wait_s``; notices that the link is lost."""
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], wait_s)
        if ready:
            received = os.read(sys.stdin.fileno(), 1 << 16)
            self.lost |= not received
            self._heard = time.monotonic()
            *lines, self._rest = (self._rest + received).split(b"\n")
            return [line.decode() for line in lines]
        self.lost |= time.monotonic() - self._heard > SILENCE_S
        return []


def main() -> int:
    """Serve one job on this host; 0 when told to end, 1 when the link is lost."""
    link, lines = _Link(), list[str]()
    while not lines and not link.lost:
        lines = link.words(_POLL_S)
    if link.lost:
        return 1
    task = Task(**json.loads(lines.pop(0)))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the front door, which says what next
    with kept(Path(task.files_folder), task.files):
        _say(ready=_facts(task))
        try:
            return _serve(task, link, lines)
        finally:
            _say(left=end_all(task.job, patience_s=_PATIENCE_S))


def _serve(task: Task, link: _Link, lines: list[str]) -> int:
    child: subprocess.Popen[bytes] | None = None
    code: int | None = None
    while not link.lost:
        for word in lines:
            if word == "start" and task.command:
                child = _start(task, task.command)
            elif word == "stop":
                signal_each(workers(of_job(task.job)), signal.SIGTERM)
            elif word == "end":
                return 0
        if child is not None and code is None and child.poll() is not None:
            code = child.returncode
            _say(ended=code)
        lines = link.words(_POLL_S)
    return 1


def _start(task: Task, command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=task.folder,
        env={**os.environ, **task.environment},
        stdin=subprocess.DEVNULL,
        # A group of its own: a Ctrl-C of the terminal is the front door's.
        start_new_session=True,
        preexec_fn=_default_signals,  # the agent ignores them, and what it starts would too
    )


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _facts(task: Task) -> dict[str, Any]:
    """What the front door must know of this host before anything starts."""
    extensions = task.environment.get("TORCH_EXTENSIONS_DIR")
    return {
        "version": __version__,
        "folder_exists": Path(task.folder).is_dir(),
        "locks": [asdict(lock) for lock in locks(extensions)],
    }


def _say(**facts: Any) -> None:
    # With the link the pipe may be gone too.
    try:
        sys.stdout.write(f"{SAYS}{json.dumps(facts)}\n")
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
