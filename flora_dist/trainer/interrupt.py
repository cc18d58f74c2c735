# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C asks a run to stop after its step; it never tears one apart."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGINT


class StopRequest:
    """While entered, SIGINT and SIGTERM are noted instead of raised.

    Repeats are noted too: torchrun passes on the Ctrl-C its processes have already got from the
    terminal, and a SIGTERM to the others as soon as one process has ended.
    """

    asked: bool
    """Whether this process was asked to stop; the processes agree on it before each step."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
