# SPDX-License-Identifier: Apache-2.0
"""Two "hosts" on this machine, joined by one cable whose speed can be set.

Each is a network and a process namespace of its own. Nothing is created in the machine's own
network namespace, and the kernel takes everything away when this process ends, however it ends.
Needs root, Linux, util-linux and iproute2.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.launched import SERVER, LaunchedPool

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500  # free: nobody else is in these namespaces
WAIT_SECONDS = 10.0
SMALLEST_BURST = 64 << 10
"""Bytes that pass unshaped; one packet of the kernel's segmentation must fit."""
LARGEST_MBIT = 200
"""Faster links need a larger burst: rate / 250 ticks per second, at least."""

# /sys of the machine would show its own interfaces; /proc its own processes.
INIT = """\
mount -t proc proc /proc && mount -t sysfs sysfs /sys && ip link set lo up && exec sleep inf"""
NAMESPACES = ("--net", "--pid", "--mount", "--ipc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One of the two."""

    address: str
    pid: int
    """Its first process, as the machine counts."""

    def argv(self, *command: str) -> list[str]:
        """``command`` as it is started there."""
        return ["nsenter", "-t", str(self.pid), *NAMESPACES, "--", *command]

    def run(self, *command: str) -> str:
        """What ``command`` prints there."""
        done = subprocess.run(self.argv(*command), check=True, capture_output=True, text=True)
        return done.stdout

    def shape(self, mbit: int | None) -> None:
        """Limit what leaves by the cable; None: as fast as the machine can."""
        if mbit is None:
            return
        assert mbit <= LARGEST_MBIT, f"a burst of {SMALLEST_BURST} bytes is too small for {mbit}"
        limit = ("tbf", "rate", f"{mbit}mbit", "burst", str(SMALLEST_BURST), "latency", "50ms")
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", *limit)


@contextmanager
def two_hosts(mbit: int | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts with the interface eth0 each, ``mbit`` million bits per second both ways."""
    if os.geteuid() != 0:
        raise PermissionError("hosts of their own need namespaces; run this as root.")
    holders = [_holder() for _ in ADDRESSES]
    try:
        first, second = (
            Host(address=address, pid=_first_process(holder))
            for address, holder in zip(ADDRESSES, holders, strict=True)
        )
        cable = ("type", "veth", "peer", "name", "eth0", "netns", str(second.pid))
        # From outside the process namespace: the other host's pid means nothing inside.
        net = ("nsenter", "-t", str(first.pid), "--net", "--")
        subprocess.run([*net, "ip", "link", "add", "eth0", *cable], check=True)
        for host in (first, second):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.shape(mbit)
        yield first, second
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def pool_on(hosts: tuple[Host, Host], *, per_host: int = 1) -> LaunchedPool:
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


def _holder() -> subprocess.Popen[bytes]:
    """Keeps a host's namespaces; dies with this process, and takes all that runs there with it."""
    dies = ["setpriv", "--pdeathsig", "KILL", "--"]
    apart = ["unshare", *NAMESPACES, "--fork", "--kill-child"]
    return subprocess.Popen([*dies, *apart, "sh", "-c", INIT], stdin=subprocess.DEVNULL)


def _first_process(holder: subprocess.Popen[bytes]) -> int:
    """The holder's child, once it has set its host up."""
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if holder.poll() is not None:
            raise RuntimeError(f"a host could not be made: unshare ended with {holder.returncode}")
        for child in children.read_text().split():
            if Path(f"/proc/{child}/comm").read_text() == "sleep\n":
                return int(child)
        time.sleep(0.01)
    raise TimeoutError(f"a host was not ready after {WAIT_SECONDS} s")
