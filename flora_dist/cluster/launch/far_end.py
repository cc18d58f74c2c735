# SPDX-License-Identifier: Apache-2.0
"""The far end of a link: it answers on a host, and leaves nothing behind when the link ends.

Its input is one JSON a line: the link's token and environment, then questions, each answered by a
thread of its own; {} is a sign of life. Where it falls silent or ends, by whatever cause, what was
started here ends: a host behind a pulled cable would compute forever otherwise.

Its output is one JSON a line behind the token: that it is there, answers, and what the programs it
has started print, wrapped. They write into pipes of theirs and the token is in no environment and
on no command line, so nothing that a program or a login prints passes for a word of this end.
Standard library only: it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

from flora_dist.cluster.launch.outlet import FOR_EVER_S, Outlet
from flora_dist.version import __version__

BEAT_S = 5.0
"""Seconds between lines of the near end."""
SILENCE_S = 30.0
"""Seconds without one after which the link is lost."""
_LAST_WORDS_S = 1.0


class Voice:
    """Sends lines to the near end."""

    def __init__(self, token: str) -> None:
        self._token = token
        # Programs wait where the link is slow; a link that stands still is lost, which ends them.
        self._outlet = Outlet(sys.stdout.fileno(), FOR_EVER_S)

    def say(self, **facts: Any) -> None:
        """Send one line, without waiting."""
        self._outlet.urge(self._line(facts))

    def pass_on(self, stream: int, data: bytes) -> None:
        """What a program has printed, 1 or 2."""
        text = data.decode("utf-8", "surrogateescape")
        self._outlet.put(self._line({"stream": stream, "text": text}))

    def close(self) -> None:
        """Return when everything is sent, or nobody reads it any more."""
        self._outlet.close(_LAST_WORDS_S)

    def _line(self, facts: Mapping[str, Any]) -> bytes:
        return f"{self._token} {json.dumps(facts)}\n".encode()


class Served(Protocol):
    """What may be asked here."""

    def asks(self) -> Mapping[str, Callable[..., Any]]:
        """By name."""

    def end(self) -> object:
        """Leave nothing behind, and start nothing any more."""


def serve(served_by: Callable[[Voice], Served]) -> NoReturn:
    """Answer until the link ends, and end the process."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # The near end says when it is over. Not SIG_IGN, which all that is started would inherit.
        signal.signal(number, lambda *_: None)
    lines = _lines()
    first = next(lines, None)
    if first is not None:
        settings = json.loads(first)
        os.environ.update(settings["environment"])
        voice = Voice(settings["token"])
        voice.say(hello=__version__)
        served = served_by(voice)
        asks = served.asks()
        for question in filter(None, map(json.loads, lines)):
            threading.Thread(target=_answer, args=(voice, asks, question), daemon=True).start()
        served.end()
        voice.close()
    # Threads may wait in connections to hosts that do not answer.
    os._exit(0)


def _lines() -> Iterator[bytes]:
    """What the near end says, until the link is lost."""
    rest, heard = b"", time.monotonic()
    while time.monotonic() - heard < SILENCE_S:
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], 0.5)
        if ready:
            received = os.read(sys.stdin.fileno(), 1 << 16)
            if not received:
                return
            heard = time.monotonic()
            *lines, rest = (rest + received).split(b"\n")
            yield from lines


def _answer(
    voice: Voice, asks: Mapping[str, Callable[..., Any]], question: Mapping[str, Any]
) -> None:
    number = question["number"]
    try:
        voice.say(number=number, answer=asks[question["ask"]](**question["what"]))
    except (
        Exception
    ) as error:  # whatever it is: the one who asks is to know, and other answers go on
        voice.say(number=number, failed=f"{type(error).__name__}: {error}")
