# SPDX-License-Identifier: Apache-2.0
"""One process at a time changes the names in a folder of checkpoints. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = ".lock"
_PATIENCE_SECONDS = 120.0
"""A lock is held for a few renames; a process that holds it longer waits for its file system."""
_POLL_SECONDS = 0.01
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which a kill gives back; its file is there only meanwhile.

    On file systems without locks nothing is held, with a warning.

    Raises:
        ValueError: another process holds it and does not let go.
        OSError: the file system.
    """
    file, descriptor = folder / _NAME, None
    stop = time.monotonic() + _PATIENCE_SECONDS
    while descriptor is None:
        descriptor = _taken(file)
        if descriptor is None and time.monotonic() > stop:
            raise ValueError(
                f"a save needs the lock of its folder; another process has held '{file}' for "
                f"{_PATIENCE_SECONDS:.0f} s. Check whether that process hangs, and stop it."
            )
        if descriptor is None:
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        # While it is held: who waits for it sees that its name is gone, and makes another.
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _taken(file: Path) -> int | None:
    """An open file that holds the lock; None: somebody else has it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened, named = os.fstat(descriptor), file.stat()
        if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno in _UNKNOWN:
            warnings.warn(
                f"the file system of '{file.parent}' does not support locks ({error}): let only "
                "one run save there.",
                stacklevel=4,
            )
            return descriptor
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
