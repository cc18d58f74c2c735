# SPDX-License-Identifier: Apache-2.0
"""The trainer with a fault in one process: python -m tests.trainer.failing PROCESS ARGUMENTS."""

from __future__ import annotations

import os
import sys
from typing import Any

from flora_dist.trainer import loop, main


def break_down(run: loop.TrainingRun, step: int, *others: Any, **more: Any) -> object:
    """In place of the loop's step: the fourth one divides by zero."""
    if step == 3:
        raise ZeroDivisionError("a fault of this process alone")
    return take_step(run, step, *others, **more)


if __name__ == "__main__":
    take_step = loop._take_step
    if os.environ["RANK"] == sys.argv[1]:
        loop._take_step = break_down  # type: ignore[assignment]
    sys.exit(main(sys.argv[2:]))
