# SPDX-License-Identifier: Apache-2.0
"""How far a run is: a bar on a terminal, lines in a log, on process 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from flora_dist.trainer.metrics import Record

if TYPE_CHECKING:
    from rich.console import Console


class Progress(Protocol):
    """What the loop tells."""

    def update(self, step: int, record: Record) -> None:
        """A step with what was measured at it."""


class Silence:
    """Nothing is shown."""

    def update(self, step: int, record: Record) -> None:
        """Nothing."""


class _LineProgress:
    """A line for each record: output that is no terminal is read later, or by a program."""

    def __init__(self, console: Console, label: str, steps: int) -> None:
        self._console, self._label, self._steps = console, label, steps

    def update(self, step: int, record: Record) -> None:
        words = [f"{self._label} step {step:,}/{self._steps:,}", *_words(record)]
        self._console.print(", ".join(words), soft_wrap=True, highlight=False)
        self._console.file.flush()


class _BarProgress:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, step: int, record: Record) -> None:
        shown = (
            dict(zip(("loss", "rate"), _words(record), strict=False)) if "loss" in record else {}
        )
        self._bar.update(self._task, completed=step, **shown)


def _words(record: Record) -> list[str]:
    """The record in words; what it has not is left out.

    >>> _words({"loss": 2.5, "lr": 1e-3, "tokens_per_second": 9744.2, "eta_seconds": 61.0})
    ['loss 2.500', '9,744 tokens/s', 'lr 0.001', 'left 0:01:01']
    """
    forms = {
        "loss": "loss {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "lr": "lr {:.3g}",
        "gradient_norm": "gradient norm {:.3g}",
        "validation_loss": "validation loss {:.4f}",
        "validation_perplexity": "perplexity {:.2f}",
    }
    words = [
        form.format(value) for key, form in forms.items() if (value := record.get(key)) is not None
    ]
    left = record.get("eta_seconds")
    return words if left is None else [*words, f"left {timedelta(seconds=round(left))}"]


@contextmanager
def open_progress(console: Console | None, label: str, steps: int) -> Iterator[Progress]:
    """How far a run of so many steps is; None shows nothing."""
    if console is None:
        yield Silence()
        return
    if not console.is_terminal:
        yield _LineProgress(console, label, steps)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        yield _BarProgress(bar, bar.add_task(label, total=steps, loss="", rate=""))
