# SPDX-License-Identifier: Apache-2.0
"""The doctor's link to one host: questions and answers over ssh's pipes, or a process here."""

from __future__ import annotations

import itertools
import json
import queue
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from flora_dist.doctor.agent import BEAT_S, SAYS
from flora_dist.launch.ssh import over_ssh

_GOODBYE_S = 3.0
_NOISE = re.compile(r"^(Warning: Permanently added|\*\* |Pseudo-terminal)")
# A folder that is not there must not keep the agent from saying so, and `-m` finds a package that
# lies in it. Words, not text: nothing of the job is read by this shell.
_START = 'cd -- "$1" 2>/dev/null; shift; exec "$@"'


class Lost(Exception):
    """A host did not answer; it says how."""


def agent_command(python: str, folder: str, environment: Mapping[str, str]) -> list[str]:
    """What runs on a host."""
    given = [f"{name}={value}" for name, value in sorted(environment.items())]
    agent = [python, "-u", "-m", "flora_dist.doctor.agent", folder]
    return ["sh", "-c", _START, "sh", folder, "env", *given, *agent]


class Session:
    """An agent that has been started, and the threads that listen to it."""

    def __init__(self, name: str, command: Sequence[str], *, ssh: bool) -> None:
        self.name = name
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            over_ssh(name, command) if ssh else list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.Queue[Mapping[str, Any] | None]] = {0: queue.Queue()}
        self._changing = threading.Lock()
        self._errors: deque[str] = deque(maxlen=20)
        self._ended = False
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=each, daemon=True)
            for each in (self._hear, self._hear_errors, self._beat)
        ]
        for thread in self._threads:
            thread.start()

    def hello(self, limit_s: float) -> str:
        """The version of flora_dist there.

        Raises:
            Lost: no agent there within ``limit_s`` seconds.
        """
        return str(self._answer(0, limit_s, "start")["hello"])

    def ask(self, ask: str, limit_s: float, /, **what: Any) -> Any:
        """The answer to a question.

        Raises:
            Lost: none within ``limit_s`` seconds, the link ended, or the host could not answer.
        """
        with self._changing:
            number = next(self._numbers)
            self._answers[number] = queue.Queue()
            if self._ended:
                self._answers[number].put(None)
        self._write({"number": number, "ask": ask, "what": what})
        found = self._answer(number, limit_s, ask)
        if "failed" in found:
            raise Lost(found["failed"])
        return found["answer"]

    def last_words(self) -> str:
        """The last line of errors, ssh's or Python's."""
        return self._errors[-1].rstrip(".") if self._errors else ""

    def code(self) -> int | None:
        """The exit code of ssh or the agent, where it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return self._process.returncode

    def close(self) -> None:
        """End the agent and what it has started."""
        self._over.set()
        with suppress(OSError):  # it has gone before
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=_GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, number: int, limit_s: float, ask: str) -> Mapping[str, Any]:
        try:
            found = self._answers[number].get(timeout=limit_s)
        except queue.Empty:
            raise Lost(f"no answer to {ask!r} within {limit_s:.0f} s") from None
        if found is None:
            raise Lost(self.last_words() or f"the connection ended with code {self.code()}")
        return found

    def _write(self, question: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._changing, suppress(OSError, ValueError):  # gone: the reader tells
            self._process.stdin.write(f"{json.dumps(question)}\n")
            self._process.stdin.flush()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            _, mark, said = line.partition(SAYS)  # a login may print without an end of line
            if mark:
                facts = json.loads(said)
                self._answers[facts.get("number", 0)].put(facts)
        self._threads[1].join(timeout=1.0)  # the errors that came before the end
        with self._changing:
            self._ended = True
            for waiting in self._answers.values():
                waiting.put(None)

    def _hear_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip() and not _NOISE.match(line):
                self._errors.append(line.strip())

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self._write({})
