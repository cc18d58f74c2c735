# SPDX-License-Identifier: Apache-2.0
"""A host looks at its network: interfaces, names, and what its ranks would use."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from flora_dist.cluster.doctor.facts import Interface, Network
from flora_dist.world import interface_toward, interfaces

_NAME_S = 8.0
"""Seconds for a resolver; glibc asks three servers for five each otherwise."""
_GET_MTU = 0x8921  # SIOCGIFMTU


def look_at_network(
    master: str, names: Mapping[str, str], environment: Mapping[str, str]
) -> Network:
    """What is there, and what the environment of a rank chooses of it.

    Args:
        master: address where process 0 will listen.
        names: the job's hosts.
        environment: of a rank.
    """
    own = socket.gethostname()
    found = _resolved([*names, own])
    return Network(
        interfaces=tuple(
            Interface(name=name, address=address, mtu=_mtu(name))
            for name, address in interfaces().items()
        ),
        toward=interface_toward(master),
        names={name: found[name] for name in names},
        own=found[own],
        gloo=environment.get("GLOO_SOCKET_IFNAME") or None,
        nccl=environment.get("NCCL_SOCKET_IFNAME") or None,
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
    )


def _resolved(names: list[str]) -> dict[str, str | None]:
    """Addresses of names, asked for side by side; None: none, or no answer in time."""
    wanted = list(dict.fromkeys(names))
    pool = ThreadPoolExecutor(max_workers=min(32, len(wanted)))
    asked = {name: pool.submit(_address, name) for name in wanted}
    wait(asked.values(), timeout=_NAME_S)
    found = {name: answer.result() if answer.done() else None for name, answer in asked.items()}
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def _address(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _mtu(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked.fileno(), _GET_MTU, name.encode()[:15].ljust(256, b"\0"))
    return int(struct.unpack_from("i", answer, 16)[0])
