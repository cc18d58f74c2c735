# SPDX-License-Identifier: Apache-2.0
"""The near end of a link to a host: it starts the far end, asks it, and hears what it says."""

from __future__ import annotations

import itertools
import json
import queue
import re
import secrets
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from typing import Any

from flora_dist.cluster.launch.far_end import BEAT_S

GOODBYE_S = 10.0
"""Seconds in which a far end must have ended what it has started."""
_ERRORS_S = 1.0
"""Seconds for ssh's last words, which may come behind its end."""
_NOISE = re.compile(r"^(Warning: Permanently added|\*\* |Pseudo-terminal)")
# Without these Python, or this package there, may not start; all else travels in the first line,
# where nobody sees it: every user of a host may read command lines.
_TO_START = ("LD_LIBRARY_PATH", "PYTHONPATH")
# A folder that is not there must not keep the far end from saying so, and `-m` finds a package that
# lies in it. Words, not text: nothing of the job is read by this shell.
_START = 'cd -- "$1" 2>/dev/null; shift; exec "$@"'


class Lost(Exception):
    """A host did not answer; the message says how it failed."""


def far_command(module: str, python: str, folder: str, environment: Mapping[str, str]) -> list[str]:
    """The words that start a far end on a host."""
    given = [f"{name}={environment[name]}" for name in _TO_START if name in environment]
    return ["sh", "-c", _START, "sh", folder, "env", *given, python, "-u", "-m", module]


class Session:
    """A far end that has been started by a command, ssh or not, and the threads that listen to it.

    Args:
        host: its name.
        command: starts the far end.
        environment: laid over the host's own.
        heard: takes what programs there print, and ssh's own errors once the far end is there, as
            the number of a stream and bytes.
    """

    def __init__(
        self,
        host: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        heard: Callable[[int, bytes], None],
    ) -> None:
        self.host = host
        self.greeted: Future[str] = Future()
        """The version of flora_dist there."""
        self._heard = heard
        self._token = secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._asked: dict[int, Future[Any]] = {}
        self._changing = threading.Lock()
        self._ended = False
        self._errors: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C of the terminal would take ssh away first
        )
        # A host that is gone must not stop the others' lines: its pipe fills, and its thread waits.
        self._words: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._words.put({"token": self._token, "environment": dict(environment)})
        self._overhearing = threading.Thread(target=self._overhear, daemon=True)
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        for thread in (self._overhearing, self._hearing):
            thread.start()
        threading.Thread(target=self._send, daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether the far end, or ssh for it, still runs."""
        return self._process.poll() is None

    def begin(self, ask: str, /, **what: Any) -> Future[Any]:
        """Ask, and wait for the answer some other time; `Lost` where none can come."""
        future: Future[Any] = Future()
        with self._changing:
            number = next(self._numbers)
            self._asked[number] = future
            if self._ended:
                future.set_exception(Lost(self._why()))
        self._words.put({"number": number, "ask": ask, "what": what})
        return future

    def ask(self, ask: str, limit_s: float, /, **what: Any) -> Any:
        """The answer to a question.

        Raises:
            Lost: none within ``limit_s`` seconds, the link ended, or the host could not answer.
        """
        return answer(self.begin(ask, **what), ask, limit_s)

    def hello(self, limit_s: float) -> str:
        """The version of flora_dist there.

        Raises:
            Lost: no far end there within ``limit_s`` seconds.
        """
        return str(answer(self.greeted, "start", limit_s))

    def last_words(self, count: int = 1) -> str:
        """The last lines of errors, ssh's or Python's."""
        return "; ".join(list(self._errors)[-count:]).rstrip(".")

    def code(self) -> int | None:
        """The exit code of ssh or the far end, where it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return self._process.returncode

    def close(self, limit_s: float = GOODBYE_S) -> None:
        """End the far end and what it has started; all that it says is heard before.

        ``limit_s``: seconds after which this end of the link is cut.
        """
        self._words.put(None)
        try:
            self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._hearing.join(_ERRORS_S)

    def _send(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError), pipe:  # the far end is gone, which the other threads notice
            while True:
                try:
                    word = self._words.get(timeout=BEAT_S)
                except queue.Empty:
                    word = {}
                if word is None:
                    return
                pipe.write(f"{json.dumps(word)}\n".encode())
                pipe.flush()

    def _hear(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        mark = f"{self._token} ".encode()
        with pipe:
            for line in pipe:
                self._listen(*line.partition(mark))  # a login may print without an end of line
        self._overhearing.join(_ERRORS_S)
        with self._changing:
            self._ended = True
            for future in (self.greeted, *self._asked.values()):
                with suppress(InvalidStateError):
                    future.set_exception(Lost(self._why()))

    def _listen(self, before: bytes, mark: bytes, said: bytes) -> None:
        if before and self.greeted.done():
            self._heard(1, before)
        else:  # nologin says here why it refuses
            self._note(before)
        if mark:
            self._take(json.loads(said))

    def _take(self, facts: Mapping[str, Any]) -> None:
        if "stream" in facts:
            self._heard(facts["stream"], facts["text"].encode("utf-8", "surrogateescape"))
        elif "hello" in facts:
            self.greeted.set_result(facts["hello"])
        elif "failed" in facts:
            self._asked[facts["number"]].set_exception(Lost(facts["failed"]))
        else:
            self._asked[facts["number"]].set_result(facts["answer"])

    def _overhear(self) -> None:
        pipe = self._process.stderr
        assert pipe is not None
        with pipe:
            for line in pipe:
                self._note(line)
                if self.greeted.done():
                    self._heard(2, line)

    def _note(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        if text and not _NOISE.match(text):
            self._errors.append(text)

    def _why(self) -> str:
        return self.last_words() or f"the connection ended with code {self.code()}"


def answer(future: Future[Any], ask: str, limit_s: float) -> Any:
    """What was answered to ``ask``.

    Raises:
        Lost: nothing within ``limit_s`` seconds, or nothing can be any more.
    """
    if not wait([future], limit_s).done:
        raise Lost(f"no answer to {ask!r} within {limit_s:.0f} s")
    return future.result()
