# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM ask a run to stop after its step; they never tear one apart."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGINT
# EX_TEMPFAIL of sysexits.h: to be tried again.
_TRY_AGAIN = 75


class StopRequest:
    """While entered, SIGINT and SIGTERM are noted instead of raised.

    Repeats are noted too: torchrun passes on the Ctrl-C its processes have already got from the
    terminal, and a SIGTERM to the others as soon as one process has ended. The first one counts.
    """

    asked: signal.Signals | None
    """What this process was asked to stop with; the processes agree on it before each step."""
    agreed: signal.Signals | None
    """What all of them stop for, once they have agreed to."""

    def __init__(self) -> None:
        self.asked = self.agreed = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, *, interrupted: int, preempted: int) -> bool:
        """Whether to stop, from how many processes got a SIGINT and how many a SIGTERM."""
        if interrupted:
            self.agreed = signal.SIGINT
        elif preempted:
            self.agreed = signal.SIGTERM
        return self.agreed is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 0 after SIGTERM: a scheduler takes the machine and all is well.

        Where torchrun restarts processes, one that was not asked itself exits with 75: SIGTERM took
        one machine of an elastic job, and this one's agent must see that the job is not done.
        """
        if self.agreed is signal.SIGINT:
            return EXIT_CODE
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        return _TRY_AGAIN if restarts and self.agreed is not None and self.asked is None else 0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = signal.Signals(number)
