# SPDX-License-Identifier: Apache-2.0
"""The faults that the doctor must name: how each is planted, and what must be said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import doctor_faults as faults
from tests.cluster.hosts import Host
from tests.harness.launched import ROOT

CONFIG = "train:\n  seed: {seed}\n"
EXTENSIONS = Path("/root/extensions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Three hosts, and the doctor called on the first of them."""

    hosts: list[Host]
    scratch: Path

    def doctor(self, *options: str, count: int = 3, folder: Path = ROOT) -> tuple[int, Any]:
        """Exit code and the JSON of the doctor on the first hosts."""
        hostfile = self.hostfile([host.name for host in self.hosts[:count]])
        done = self.call("--hostfile", str(hostfile), "--json", *options, folder=folder)
        assert done.returncode in {0, 1}, done.stderr
        return done.returncode, json.loads(done.stdout)

    def call(self, *words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """The doctor on the first host, which alone has that folder in its home."""
        enter = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", folder)
        variables = {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
        command = (sys.executable, "-m", "flora_dist.cluster.doctor", *words)
        return self.hosts[0].run(*enter, *command, environment=variables, check=False)

    def hostfile(self, names: list[str]) -> Path:
        path = self.scratch / "hostfile"
        path.write_text("".join(f"{name} slots=1\n" for name in names))
        return path

    @property
    def config(self) -> Path:
        return self.scratch / "config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is planted and what must be said of it."""

    plant: Callable[[Cluster], AbstractContextManager[None]]
    subject: str
    says: tuple[str, ...]
    """Words of one finding: the host and the cause."""
    hosts: tuple[str, ...] = ("node2",)
    options: tuple[str, ...] = ()
    severity: str = "error"
    count: int = 2
    """Hosts of the job: three where they are compared."""
    others: tuple[str, ...] = ()
    """Subjects of findings that follow from the fault."""


def _changed_config(cluster: Cluster) -> AbstractContextManager[None]:
    text = CONFIG.format(seed=8)
    return faults.replaced(cluster.hosts[1], cluster.config, text, cluster.scratch)


def _own_name(cluster: Cluster) -> AbstractContextManager[None]:
    text = "127.0.0.1 localhost\n127.0.1.1 node2\n10.77.0.1 node1\n10.77.0.3 node3\n"
    return faults.replaced(cluster.hosts[1], Path("/etc/hosts"), text, cluster.scratch)


FAULTS = {
    "another version of a package": Fault(
        plant=lambda c: faults.package_of_version(c.hosts[1], "deepspeed", "0.17.0", c.scratch),
        subject="package",
        says=("deepspeed differs", "on node1, node3; 0.17.0 on node2"),
        count=3,
    ),
    "changed source of the package": Fault(
        plant=lambda c: faults.another_source(c.hosts[1], c.scratch),
        subject="source",
        says=("source files of flora_dist differ", "on node1, node3;", "on node2"),
        count=3,
    ),
    "a firewall at the port of process 0": Fault(
        plant=lambda c: faults.done(
            c.hosts[0],
            "iptables -A INPUT -p tcp --dport 29500 -s 10.77.0.2 -j DROP",
            "iptables -F INPUT",
        ),
        subject="reach",
        says=("node2 cannot connect to node1 at 10.77.0.1:29500", "no answer"),
        hosts=("node2", "node1"),
    ),
    "a route that leads nowhere": Fault(
        plant=lambda c: faults.done(
            c.hosts[1],
            "ip route add blackhole 10.77.0.3/32",
            "ip route del blackhole 10.77.0.3/32",
        ),
        subject="reach",
        says=("node2 cannot connect to node3 at 10.77.0.3:",),
        hosts=("node2", "node3"),
        count=3,
    ),
    "a port that is taken": Fault(
        plant=lambda c: faults.port_taken(c.hosts[0], 29500),
        subject="port",
        says=("port 29500 of node1 cannot be opened", "in use"),
        hosts=("node1",),
    ),
    "an interface that is not there": Fault(
        plant=lambda c: faults.login_says(c.hosts[1], "export GLOO_SOCKET_IFNAME=eth9"),
        subject="interface",
        says=("GLOO_SOCKET_IFNAME=eth9 on node2", "no such interface", "eth0 10.77.0.2"),
    ),
    "the loopback interface": Fault(
        plant=lambda c: faults.login_says(c.hosts[1], "export GLOO_SOCKET_IFNAME=lo"),
        subject="interface",
        says=("GLOO_SOCKET_IFNAME=lo on node2", "the way to 10.77.0.1 is eth0"),
        others=("mtu", "reach"),
    ),
    "no g++": Fault(
        plant=lambda c: faults.without_program(c.hosts[1], "c++", "g++"),
        subject="compiler",
        says=("g++ is missing on node2",),
    ),
    "no ninja": Fault(
        plant=lambda c: faults.without_program(c.hosts[1], "ninja"),
        subject="compiler",
        says=("ninja is missing on node2",),
    ),
    "no mpi4py": Fault(
        plant=lambda c: faults.without_mpi4py(c.hosts[1]),
        subject="mpi4py",
        says=("mpi4py cannot be imported on node2", "No module named 'mpi4py.MPI'"),
        options=("--launcher", "openmpi"),
        others=("package",),
    ),
    "two seeds": Fault(
        plant=_changed_config,
        subject="seed",
        says=("train.seed of", "7 on node1, node3; 8 on node2"),
        count=3,
    ),
    "no sshd": Fault(
        plant=lambda c: faults.without_sshd(c.hosts[1]),
        subject="ssh",
        says=("node2 cannot be reached by ssh", "Connection refused"),
    ),
    "a pulled cable": Fault(
        plant=lambda c: faults.unplugged(c.hosts[1], c.hosts[0]),
        subject="ssh",
        says=("node2 cannot be reached by ssh",),
    ),
    "a name that is its own loopback": Fault(
        plant=_own_name,
        subject="own name",
        says=("node2 resolves its own host name to 127.0.1.1",),
        severity="warning",
    ),
    "a stale lock": Fault(
        plant=lambda c: faults.stale_lock(c.hosts[1], EXTENSIONS),
        subject="lock",
        says=("stale lock", "on node2", "/root/extensions/py311_cpu/deepspeed_shm_comm/lock"),
    ),
    "a blank line in .deepspeed_env": Fault(
        plant=lambda c: faults.written(c.hosts[0], Path("/root/.deepspeed_env"), "A=1\n\nB=2\n"),
        subject="deepspeed_env",
        says=("line 2 of /root/.deepspeed_env on node1", "not NAME=VALUE"),
        hosts=("node1",),
    ),
    "tiny /dev/shm": Fault(
        plant=lambda c: faults.done(
            c.hosts[1],
            "mount -o remount,size=16m /dev/shm",
            "mount -o remount,size=12g /dev/shm",
        ),
        subject="shm",
        says=("/dev/shm of node2 has 16 MiB",),
        severity="warning",
    ),
    "a slow link": Fault(
        plant=lambda c: faults.slow(c.hosts[2], 50),
        subject="slow",
        says=("all 2 links of node3 are slow", "the fastest of the job has"),
        hosts=("node3",),
        severity="warning",
        count=3,
    ),
    "no Python": Fault(
        plant=lambda c: faults.hidden(c.hosts[1], Path(sys.executable)),
        subject="python",
        says=(f"{sys.executable} cannot be started on node2", "Permission denied"),
    ),
    "packets of another size": Fault(
        plant=lambda c: faults.done(
            c.hosts[1], "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"
        ),
        subject="mtu",
        says=("1500 on node1, node3; 1400 on node2",),
        severity="warning",
        count=3,
    ),
    "few open files": Fault(
        plant=lambda c: faults.login_says(c.hosts[1], "ulimit -n 256"),
        subject="limits",
        says=("node2 allows 256 open files",),
        severity="warning",
    ),
}
