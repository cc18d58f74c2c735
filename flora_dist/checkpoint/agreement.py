# SPDX-License-Identifier: Apache-2.0
"""Ranks that save or load together succeed or fail together, all with the same error."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from flora_dist.core.comm.groups import gather, has_peers

T = TypeVar("T")
Group = dist.ProcessGroup | None
"""Who saves or loads together; None: the default group, or this process alone."""


def place(group: Group = None) -> tuple[int, int]:
    """This rank among those together, and how many they are."""
    if not has_peers():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@contextmanager
def agreed(group: Group = None) -> Iterator[None]:
    """Run a block without messages on every rank; if it raises on one, every rank raises.

    Raises:
        ValueError: what a rank's check or file system found; of the first rank that found any.
        Exception: anything else as it is where it was raised, as a RuntimeError elsewhere: ranks
            that were not told would wait for the others until their group's timeout.
    """
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        caught = error
    rank, size = place(group)
    reports = everyones(None if caught is None else _report(caught), group)
    found = [(index, report) for index, report in enumerate(reports) if report is not None]
    if not found:
        return
    first, (is_expected, text) = found[0]
    if caught is not None and not is_expected:
        raise caught
    kind = ValueError if is_expected else RuntimeError
    if caught is not None and first == rank:
        raise kind(text) from caught
    raise kind(text if size == 1 else f"{text} (found on rank {first})")


@contextmanager
def readable(where: Path) -> Iterator[None]:
    """DCP's own failures, which are no ``Exception``, as what users see.

    Raises:
        ValueError: the first rank's.
    """
    try:
        with warnings.catch_warnings():
            # Without a group DCP warns that it takes this process for the only one: it is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
            yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise ValueError(
            f"a checkpoint's files must be readable and writable; '{where}' on rank {rank}: "
            f"{first!r}. Check the disk, or use another checkpoint."
        ) from error


def everyones(mine: T, group: Group = None) -> list[T]:
    """Each rank's, in the order of ranks."""
    return gather(mine, group) if has_peers() else [mine]


def distinct(mine: T, group: Group = None) -> list[T]:
    """What ranks have that is not equal: one, unless stages of a pipeline hold other parameters.

    Equal ones travel as a digest of their ``repr``: lists of all tensors would grow with the ranks.
    """
    digest = hashlib.sha256(repr(mine).encode()).digest()
    if len(set(everyones(digest, group))) == 1:
        return [mine]
    return everyones(mine, group)


def _report(error: Exception) -> tuple[bool, str]:
    """Whether it is one that checks and file systems raise, and what it says."""
    if isinstance(error, OSError):
        text = (
            f"a checkpoint's files must exist and the disk must accept them; {error}. Check the "
            "disk, or name another folder."
        )
        return True, text
    if isinstance(error, ValueError):
        return True, str(error)
    return False, f"{type(error).__name__}: {error}"
