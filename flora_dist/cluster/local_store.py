# SPDX-License-Identifier: Apache-2.0
"""The store in which the processes of one machine meet: no other machine reaches it.

As a program it keeps one for processes that do not themselves: torch's own, made by
`init_process_group` in process 0, listens at all addresses, and what it holds decides where
processes connect and what they unpickle.
"""

from __future__ import annotations

import signal
import socket
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from flora_dist.world import ProcessPlace, listen_at


def local_store(place: ProcessPlace, timeout: timedelta) -> Any:
    """Kept by process 0, at its address alone.

    Raises:
        ValueError: another program has its port.
        DistError: process 0 did not come within the timeout.
    """
    assert place.address is not None
    if place.process_rank == 0:
        return _kept(listen_at(place.address, place.port), timeout)
    return dist.TCPStore(  # type: ignore[attr-defined]
        place.address, place.port, is_master=False, timeout=timeout, wait_for_workers=False
    )


def _kept(listening: socket.socket, timeout: timedelta) -> Any:
    address, port = listening.getsockname()
    return dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def main() -> None:
    """Keep a store at the socket whose number is the argument, until a signal comes."""
    store = _kept(socket.socket(fileno=int(sys.argv[1])), timedelta(minutes=1))
    signal.pause()
    del store


if __name__ == "__main__":
    main()
