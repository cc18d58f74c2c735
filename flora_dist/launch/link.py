# SPDX-License-Identifier: Apache-2.0
"""The front door's end of the line to a host's agent."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from flora_dist.launch.agent import BEAT_S, SAYS, Task
from flora_dist.launch.hosts import is_local
from flora_dist.launch.ssh import over_ssh

_MARK = SAYS.encode()


class Link:
    """One host: its agent is started, hears every few seconds, and what it says is kept."""

    def __init__(self, host: str, task: Task) -> None:
        self.host = host
        self.ready: dict[str, Any] | None = None
        """The host's facts, once it has answered."""
        self.ended: int | None = None
        """The exit code of its command, once that has ended."""
        self.left: int | None = None
        """How many processes it ended at the end."""
        self.trouble: list[str] = []
        """The last lines that ssh or Python said before the agent was ready."""
        path = task.environment.get("PYTHONPATH")
        given = [] if path is None else ["env", f"PYTHONPATH={path}"]  # flora_dist may lie there
        agent = [*given, sys.executable, "-u", "-m", "flora_dist.launch.agent"]
        self._process = subprocess.Popen(
            agent if is_local(host) else over_ssh(host, agent),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C of the terminal would take ssh away first
        )
        # A host that is gone must not stop the others' lines: its pipe fills, and its thread waits.
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.say(json.dumps(asdict(task)))
        for run in (self._send, self._hear, self._overhear):
            threading.Thread(target=run, daemon=True).start()

    def say(self, word: str) -> None:
        """Send a line, some time soon."""
        self._words.put(word)

    @property
    def is_open(self) -> bool:
        """Whether the agent, or ssh for it, still runs."""
        return self._process.poll() is None

    def close(self, timeout_s: float) -> bool:
        """Let the agent end its host's part; whether it has answered."""
        self.say("end")
        deadline = time.monotonic() + timeout_s
        while self.left is None and self.is_open and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._process.kill()
        self._process.wait()
        return self.left is not None

    def _send(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError):  # the agent is gone, which the other threads notice
            while True:
                with suppress(queue.Empty):
                    word = self._words.get(timeout=BEAT_S)
                    pipe.write(f"{word}\n".encode())
                    pipe.flush()
                    continue
                pipe.write(b"beat\n")
                pipe.flush()

    def _hear(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            before, mark, said = line.partition(_MARK)
            if not mark:
                before = line
            if before:
                sys.stdout.buffer.write(before)
                sys.stdout.buffer.flush()
            if mark:
                facts = json.loads(said)
                self.ready = facts.get("ready", self.ready)
                self.ended = facts.get("ended", self.ended)
                self.left = facts.get("left", self.left)

    def _overhear(self) -> None:
        pipe = self._process.stderr
        assert pipe is not None
        while line := pipe.readline():
            if self.ready is None:
                self.trouble = [*self.trouble, line.decode(errors="replace").strip()][-3:]
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
