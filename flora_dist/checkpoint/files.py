# SPDX-License-Identifier: Apache-2.0
"""Opens files of checkpoints: regular ones of a bounded size, whatever else bears their names.

To open a FIFO waits for a writer, and a file with holes may be larger than memory: what is asked
for is checked on the open file, before a byte of it is read. Standard library only.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(file: Path) -> BinaryIO:
    """A regular file, to be read.

    Raises:
        OSError: it is missing, cannot be read, or is a folder, FIFO, socket or device.
    """
    # Without O_NONBLOCK to open a FIFO would wait; regular files do not know it.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is not a regular file", str(file))


def read_plain(file: Path, largest: int) -> bytes:
    """All bytes of a regular file of at most ``largest``.

    Raises:
        OSError: as ``open_plain``, or the file is larger.
    """
    with open_plain(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        # One more than allowed: what grows, or hides its size as files of /proc do, is seen too.
        raw = b"" if size > largest else stream.read(largest + 1)
    if size > largest or len(raw) > largest:
        raise OSError(
            errno.EFBIG, f"has {max(size, len(raw))} bytes, more than {largest} bytes", str(file)
        )
    return raw
