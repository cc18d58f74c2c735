# SPDX-License-Identifier: Apache-2.0
"""Output on its way: read line by line where a program prints, written by a thread of its own."""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from collections.abc import Callable
from typing import IO

_ROOM = 256
"""Pieces that may wait, of at most `_PIECE` bytes."""
_PIECE = 1 << 16
FOR_EVER_S = threading.TIMEOUT_MAX


class Outlet:
    """A file descriptor that may be full, slow or gone, and never holds up who gives it bytes.

    Bytes wait for room for ``patience_s`` at most. Then nothing moves there, and they are dropped
    and counted until something has been written again.
    """

    def __init__(self, descriptor: int, patience_s: float) -> None:
        self._descriptor, self._patience_s = descriptor, patience_s
        self.dropped = 0
        """Lines so far."""
        self.trouble = ""
        """Why the last of them were dropped."""
        self._counting = threading.Lock()
        self._room = threading.Semaphore(_ROOM)
        self._stalled = False
        self._written = 0
        # The flag: it was given room, which it frees.
        self._pieces: queue.SimpleQueue[tuple[bytes, bool] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Write it some time soon, or drop it."""
        if self._room.acquire(timeout=0 if self._stalled else self._patience_s):
            self._pieces.put((data, True))
            return
        self._stalled = True
        self._drop(data, "nobody reads it")

    def urge(self, data: bytes) -> None:
        """Write few words without waiting for room."""
        self._pieces.put((data, False))

    def close(self, patience_s: float) -> None:
        """Return when all is written, or nothing has moved for so long."""
        self._pieces.put(None)
        written, since = self._written, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < patience_s:
            self._thread.join(0.05)
            if self._written != written:
                written, since = self._written, time.monotonic()
        while self._thread.is_alive() and not self._pieces.empty():
            piece = self._pieces.get()
            if piece is not None:
                self._drop(piece[0], "nobody reads it")

    def _drop(self, data: bytes, trouble: str) -> None:
        with self._counting:
            self.dropped += data.count(b"\n") or 1
            self.trouble = trouble

    def _write_all(self) -> None:
        while (piece := self._pieces.get()) is not None:
            data, had_room = piece
            try:
                self._write(data)
            except OSError as error:  # closed, or a disk that is full and may be emptied
                self._drop(data, error.strerror or str(error))
            self._stalled = False
            if had_room:
                self._room.release()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._write_some(rest) :]
            self._written += 1

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # somebody who shares the terminal may have made it so
            select.select([], [self._descriptor], [])
            return 0


def pump(pipe: IO[bytes], give: Callable[[bytes], None]) -> threading.Thread:
    """Give all that comes out of a pipe to its end, in whole lines, from a thread of its own.

    Whole, since several programs share an output. A bar of progress ends its line by a return.
    """

    def run() -> None:
        rest = b""
        with pipe:
            while chunk := os.read(pipe.fileno(), _PIECE):
                rest += chunk
                end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
                if end or len(rest) > _PIECE:
                    give(rest[: end or None])
                    rest = rest[end:] if end else b""
        if rest:
            give(rest)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
