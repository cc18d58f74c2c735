# SPDX-License-Identifier: Apache-2.0
"""What the front door prints: its own lines and those of the job, which never wait for a reader."""

from __future__ import annotations

import os
from contextlib import suppress

from flora_dist.cluster.launch.outlet import Outlet

PATIENCE_S = 2.0
"""Seconds in which a full output must take something; then lines are dropped."""
LAST_LINES_S = 10.0
"""The same at the end, when no process of the job waits any more."""
_NAMES = {1: "stdout", 2: "stderr"}


class Front:
    """Standard output and error of this process, while entered.

    The job goes on where its output cannot: hours of work are worth more than lines that nobody
    reads. Each failure of stdout is told on stderr.
    """

    def __enter__(self) -> Front:
        for descriptor in _NAMES:
            with suppress(OSError):
                os.fstat(descriptor)
                continue
            # One that the shell has closed: the next pipe would have its number.
            os.open(os.devnull, os.O_RDONLY)
        self._outlets = {number: Outlet(number, PATIENCE_S) for number in _NAMES}
        self._told = 0
        return self

    def __exit__(self, *_: object) -> None:
        out = self._outlets[1]
        out.close(LAST_LINES_S)
        if out.dropped:
            self.say(f"{out.dropped} lines of output were dropped: {out.trouble}.")
        self._outlets[2].close(LAST_LINES_S)

    def pass_on(self, stream: int, data: bytes) -> None:
        """What the job has printed, 1 or 2."""
        self._outlets[stream].put(data)

    def say(self, text: str) -> None:
        """A line of the front door's own."""
        self._outlets[2].urge(f"flora-dist launch: {text}\n".encode())

    def complain(self) -> None:
        """Say once that lines are being dropped, and why."""
        out = self._outlets[1]
        if out.dropped and not self._told:
            self.say(
                f"stdout accepts no more output ({out.trouble}): the job goes on, and what it "
                "prints is dropped. Ctrl-C ends it."
            )
            self._told = out.dropped
