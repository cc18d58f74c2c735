# SPDX-License-Identifier: Apache-2.0
"""Who tells of a failure, and how: the process it began on with its traceback, others in a line."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

EXIT_CODE = 1
_KEY = "flora_dist/failures"
# torchrun looks ten times a second for a process that has ended, the deepspeed launcher once; then
# both end the others. A process that only lost its peers must not be the first to end.
_LET_THE_CAUSE_SPEAK_S = 3.0
# Before there is a group to ask: on a busy machine process 0 may be seconds behind.
_LET_PROCESS_ZERO_SPEAK_S = 10.0
# An end of a connection that gloo sees says where in its sources; nccl's errors have a type.
_GLOO = re.compile(r"\[\S*/gloo/\S*\] ")
_PORT_TAKEN = "EADDRINUSE"


class Mistake(ValueError):
    """A user's mistake that was found while there was a process group."""

    def __init__(self, text: str, *, first: bool) -> None:
        super().__init__(text)
        self.first = first


class Failed(Exception):
    """Any other failure while there was a process group; its cause is the failure itself."""

    def __init__(self, *, first: bool, lost: bool) -> None:
        super().__init__()
        self.first, self.lost = first, lost


class Store(Protocol):
    """What of torch's key-value store is used here."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a number that all processes see; the sum."""


def is_first(store: Store) -> bool:
    """Whether no other process has failed before this one; a store that is gone says so too."""
    try:
        return store.add(_KEY, 1) == 1
    except RuntimeError:  # it was kept by a process that has ended
        return True


def has_lost_peers(error: BaseException) -> bool:
    """Whether an error says only that another process does not answer."""
    return any(_is_of_the_network(each) for each in _chain(error))


def _is_of_the_network(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return _PORT_TAKEN not in str(error)
    return isinstance(error, RuntimeError) and _GLOO.search(str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def tell_mistake(error: ValueError) -> None:
    """Say a user's mistake once, without a traceback.

    Before there is a process group all processes check the same config and find the same mistake:
    process 0 speaks, and the launcher ends the others with it. One that is still there after its
    wait has found another.
    """
    first = error.first if isinstance(error, Mistake) else _rank() == 0
    if not first:
        time.sleep(_LET_PROCESS_ZERO_SPEAK_S)
    say(f"error: {_place() if _rank() else ''}{error}")


def tell(error: Exception) -> int:
    """Report a failure that is not a mistake in the config; returns the exit code."""
    if not isinstance(error, Failed):
        if _rank():
            time.sleep(_LET_PROCESS_ZERO_SPEAK_S)
        _tell_all(error)
        return EXIT_CODE
    cause = error.__cause__
    assert cause is not None
    if error.lost:
        say(
            f"{_place()}lost another process ({_words_of_the_network(cause)}); the cause is in "
            "the process that ended or hangs: look for its traceback, or for what killed it (out "
            "of memory, preemption, its machine)."
        )
        time.sleep(_LET_THE_CAUSE_SPEAK_S)
        # A checkpoint's thread may wait for the lost ones, and the interpreter for the thread.
        os._exit(EXIT_CODE)
    if error.first:
        _tell_all(cause)
    else:
        say(f"{_place()}failed too: {_headline(cause)}")
    return EXIT_CODE


def _tell_all(error: BaseException) -> None:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    say(f"{_place()}failed:\n{text.rstrip()}")
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is None:
        return
    # torchrun's own summary then names this process and not one that lost it. Without the
    # traceback, which it would show again.
    facts = {
        "message": f"{_headline(error)} (its traceback is above)",
        "extraInfo": {"timestamp": str(int(time.time()))},
    }
    Path(report).write_text(json.dumps({"message": facts}), encoding="utf-8")


def _headline(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _words_of_the_network(error: BaseException) -> str:
    """What gloo or nccl said, without the place in its sources and its advice."""
    said = next(str(each) for each in _chain(error) if _is_of_the_network(each))
    return _GLOO.sub("", said).strip().splitlines()[0].partition(". ")[0]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _place() -> str:
    return f"[process {_rank()}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def say(text: str) -> None:
    """Write a line to stderr at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
