# SPDX-License-Identifier: Apache-2.0
"""One connection between two hosts: whether it can be made, its round trip and its bandwidth.

Both ends are the doctor's. The one that connects sends the run's token, then orders of 9 bytes: a
letter and a size. "T" (take): so many bytes follow, answered by one byte; "G" (give): so many are
wanted.
"""

from __future__ import annotations

import hmac
import socket
import statistics
import struct
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

_ORDER = struct.Struct("!cQ")
_TAKE, _GIVE = b"T", b"G"
_SIZES = (256 << 10, 2 << 20, 16 << 20)
"""Bytes of one measurement: the next size where a link was too fast for the clock."""
_ENOUGH_S = 0.1
_TRIPS = 5
_CHUNK = bytes(1 << 18)
_PATIENCE_S = 20.0
"""Seconds for a piece of data: 16 MiB at 10 Mbit/s take 14 s, but are not asked for there."""
_BYTES_TO_MBIT = 8e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What one host has seen of its connection to another."""

    trouble: str | None
    """Why the connection failed; None: it did not."""
    trip_ms: float | None = None
    """Median round trip of one byte, milliseconds."""
    there_mbit: float | None = None
    """Bandwidth toward the other, 10^6 bits per second."""
    back_mbit: float | None = None


class Listener:
    """Ports of a host on which the doctor of another may measure."""

    def __init__(self, token: str, address: str) -> None:
        self._address = address
        self._token = token.encode()
        self._sockets: list[socket.socket] = []

    def open(self, port: int) -> int | str:
        """Listen on a port, 0 for any: its number, or why it cannot be opened."""
        listening = socket.socket()
        # As torch's store: a port whose last connections are just closing is free.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self._address, port))
            listening.listen(64)
        except OSError as error:
            listening.close()
            return error.strerror or str(error)
        self._sockets.append(listening)
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
        return int(listening.getsockname()[1])

    def close(self) -> None:
        """Free the ports."""
        for listening in self._sockets:
            with suppress(OSError):  # close alone does not wake a thread in accept
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                peer, _ = listening.accept()
                threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, suppress(OSError):
            peer.settimeout(_PATIENCE_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Strangers who find the port are told nothing.
            if not hmac.compare_digest(_receive(peer, len(self._token)), self._token):
                return
            while True:
                order, size = _ORDER.unpack(_receive(peer, _ORDER.size))
                if size > _SIZES[-1]:
                    return
                if order == _TAKE:
                    _drain(peer, size)
                    peer.sendall(b"\0")
                else:
                    _send(peer, size)


def measure(address: str, port: int, token: str, limit_s: float, bandwidth: bool) -> dict[str, Any]:
    """Connect to another host's listener and measure; the fields of `Connection`.

    Args:
        address: of the other host.
        port: where its doctor listens.
        token: of this run.
        limit_s: seconds for the connection.
        bandwidth: whether to send more than one byte.
    """
    try:
        with socket.create_connection((address, port), timeout=limit_s) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(token.encode())
            trips = [_taken(peer, 1) for _ in range(_TRIPS)]
            peer.settimeout(_PATIENCE_S)
            found = Connection(
                trouble=None,
                trip_ms=statistics.median(trips) * 1e3,
                there_mbit=_rate(peer, _taken) if bandwidth else None,
                back_mbit=_rate(peer, _given) if bandwidth else None,
            )
    except TimeoutError:
        found = Connection(trouble=f"no answer within {limit_s:g} s")
    except OSError as error:
        found = Connection(trouble=error.strerror or str(error))
    return asdict(found)


def _rate(peer: socket.socket, way: Any) -> float:
    for size in _SIZES:
        seconds = way(peer, size)
        if seconds > _ENOUGH_S:
            break
    return float(size * _BYTES_TO_MBIT / max(seconds, 1e-9))


def _taken(peer: socket.socket, size: int) -> float:
    began = time.monotonic()
    peer.sendall(_ORDER.pack(_TAKE, size))
    _send(peer, size)
    _receive(peer, 1)
    return time.monotonic() - began


def _given(peer: socket.socket, size: int) -> float:
    began = time.monotonic()
    peer.sendall(_ORDER.pack(_GIVE, size))
    _drain(peer, size)
    return time.monotonic() - began


def _send(peer: socket.socket, size: int) -> None:
    while size > 0:
        peer.sendall(_CHUNK[:size])
        size -= len(_CHUNK)


def _drain(peer: socket.socket, size: int) -> None:
    buffer = bytearray(len(_CHUNK))
    while size > 0:
        got = peer.recv_into(buffer, min(size, len(buffer)))
        if not got:
            raise ConnectionError("the other end closed the connection")
        size -= got


def _receive(peer: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        got = peer.recv(size - len(found))
        if not got:
            raise ConnectionError("the other end closed the connection")
        found += got
    return found
