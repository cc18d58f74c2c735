# SPDX-License-Identifier: Apache-2.0
"""The doctor's end on a host: answers questions, starts ranks, and leaves nothing behind.

Its input is the link to whoever asks, one JSON a line; where that ends or falls silent, by whatever
cause, so do the ranks and it. Answers are lines that begin with `SAYS`: a login may print what it
likes before. Standard library only: it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from flora_dist.doctor.children import Children
from flora_dist.doctor.facts import as_tree
from flora_dist.doctor.links import Listener, measure
from flora_dist.doctor.look import look
from flora_dist.version import __version__

SAYS = "::flora-doctor:: "
BEAT_S = 5.0
"""Seconds between lines of whoever asks."""
SILENCE_S = 30.0
"""Seconds without one after which the link is lost."""
_speaking = threading.Lock()


class _Host:
    """What is held open between questions."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.children = Children()

    def listen(self, ports: list[int], token: str) -> list[int | str]:
        """Open ports, 0 for any; each one's number, or why it cannot be had."""
        self.listener = Listener(token)
        return [self.listener.open(port) for port in ports]

    def close(self) -> None:
        """Close them."""
        if self.listener is not None:
            self.listener.close()

    def asks(self) -> Mapping[str, Callable[..., Any]]:
        """By name, what may be asked."""
        return {
            "facts": lambda **what: as_tree(look(**what)),
            "listen": self.listen,
            "close": self.close,
            "measure": measure,
            "ranks": self.children.run,
            "stop": self.children.end,
        }


def main() -> int:
    """Serve until the link ends."""
    # A folder that is missing is a fact, and no reason to say nothing.
    with suppress(OSError):
        os.chdir(sys.argv[1])
    _say(hello=__version__)
    host = _Host()
    asks = host.asks()
    rest, heard = b"", time.monotonic()
    while time.monotonic() - heard < SILENCE_S:
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], 1.0)
        if not ready:
            continue
        received = os.read(sys.stdin.fileno(), 1 << 16)
        if not received:
            break
        heard = time.monotonic()
        *lines, rest = (rest + received).split(b"\n")
        for question in map(json.loads, lines):
            if question:  # {} is a sign of life
                answer = threading.Thread(target=_answer, args=(asks, question), daemon=True)
                answer.start()
    host.children.end()
    # Threads may wait in connections to hosts that do not answer.
    os._exit(0)


def _answer(asks: Mapping[str, Callable[..., Any]], question: Mapping[str, Any]) -> None:
    number = question["number"]
    try:
        _say(number=number, answer=asks[question["ask"]](**question["what"]))
    except (
        Exception
    ) as error:  # whatever it is: the one who asks is to know, and other answers go on
        _say(number=number, failed=f"{type(error).__name__}: {error}")


def _say(**facts: Any) -> None:
    with _speaking, suppress(OSError):  # with the link the pipe is gone too
        sys.stdout.write(f"{SAYS}{json.dumps(facts)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
