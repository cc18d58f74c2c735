# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl and trackers: process 0 has them, the others nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flora_dist.trainer.trackers import Opener, Tracked, Tracker, open_trackers
from flora_dist.trainer.utf8 import read_utf8

Record = dict[str, float | int | None]
"""One line of metrics.jsonl: `step`, and what was measured there; None where it was not finite."""

TIMED = frozenset(
    {
        *("seconds", "tokens_per_second", "tokens_per_second_per_device", "eta_seconds"),
        *("peak_memory_bytes", "mfu"),
    }
)
"""What of a record depends on the machine and its load; the rest follows from the config."""


class Metrics:
    """The records of one optimizer's run, in memory and, on process 0, in files."""

    records: list[Record]
    """Every record of the run, those before a resume included."""

    def __init__(self, file: IO[str] | None, trackers: Sequence[Tracker]) -> None:
        self.records = []
        self._file, self._trackers = file, trackers

    def add(self, record: Record) -> None:
        """Keep a record and write it out at once: a run that dies keeps all its lines."""
        clean: Record = {
            key: value if value is None or math.isfinite(value) else None
            for key, value in record.items()
        }
        self.records.append(clean)
        if self._file is not None:
            self._file.write(_line(clean))
            self._file.flush()
        told = {key: value for key, value in record.items() if value is not None}
        step = int(told.pop("step"))
        for tracker in self._trackers:
            tracker.add(step, told)


@contextmanager
def open_metrics(folder: Path | None, openers: Sequence[Opener], run: Tracked) -> Iterator[Metrics]:
    """Metrics that append to `folder/metrics.jsonl` and tell trackers; None does neither.

    Lines of steps after `run.first_step` are dropped: a run that resumes from an older checkpoint
    takes those steps again. A kill meanwhile leaves the file as it was.

    Raises:
        ValueError: a line is not a record, or a tracker cannot start.
    """
    if folder is None:
        yield Metrics(None, ())
        return
    path = folder / "metrics.jsonl"
    earlier = _read_until(path, run.first_step)
    with open_trackers(openers, run) as trackers:
        partial = folder / ".metrics.jsonl.partial"
        partial.write_text("".join(map(_line, earlier)), encoding="utf-8")
        partial.replace(path)
        with path.open("a", encoding="utf-8") as file:
            metrics = Metrics(file, trackers)
            metrics.records += earlier
            yield metrics


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read_until(path: Path, step: int) -> list[Record]:
    if not path.exists():
        return []
    # What stands behind the last line's end is a line that a kill cut short: of a step to be taken
    # again, since a checkpoint comes after the line of its step.
    *lines, _ = read_utf8(path).split("\n")
    try:
        records: list[Record] = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"every line of {str(path)!r} must be a record; {error}. Remove that line."
        ) from error
    return [record for record in records if (record["step"] or 0) <= step]
