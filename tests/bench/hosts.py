# SPDX-License-Identifier: Apache-2.0
"""Ranks on several hosts of this machine, used like any pool, and the bytes that leave a host."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.hosts import Host
from tests.harness.launched import SERVER, LaunchedPool

PORT = 29500  # free: nobody else is in these namespaces


def pool_on(hosts: Sequence[Host], *, per_host: int = 1) -> LaunchedPool:
    """Ranks on both hosts, used like any pool; those of one host follow each other."""

    def command(world_size: int) -> list[str]:
        starts = []
        for rank in range(world_size):
            host, place = hosts[rank // per_host], rank % per_host
            variables = {
                "RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_RANK": place,
                "LOCAL_WORLD_SIZE": per_host,
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": PORT,
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            words = ["env", *(f"{name}={value}" for name, value in variables.items())]
            starts.append(f"{shlex.join(host.argv(*words, sys.executable, str(SERVER)))} $0 &")
        return ["bash", "-c", "\n".join([*starts, "wait"])]

    return LaunchedPool(command, per_host * len(hosts))


def bytes_sent(*interfaces: str) -> int:
    """What has left this process's host by some interfaces, frames and all."""
    counters = {}
    for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        counters[name.strip()] = int(numbers.split()[8])
    return sum(counters[name] for name in interfaces)
