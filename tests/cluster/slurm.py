# SPDX-License-Identifier: Apache-2.0
"""A real Slurm on the hosts: a controller on the first, a daemon on each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.hosts import Host

WAIT_SECONDS = 20.0
CPUS = 2
# No munge and no systemd here; cgroup/v1, as slurmd ends where it finds neither kind of cgroups.
# SlurmdTimeout: a node that is gone is noticed after so many seconds; Slurm's default is 300.
CONFIG = """\
ClusterName=test
SlurmctldHost={first}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=10
KillWait=10
UnkillableStepTimeout=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(hosts: Sequence[Host], folder: Path) -> Iterator[dict[str, str]]:
    """Slurm while entered; the variables by which its commands find it."""
    (folder / "state").mkdir()
    names = ",".join(host.name for host in hosts)
    nodes = "\n".join(
        f"NodeName={host.name} NodeAddr={host.address} CPUs={CPUS} State=UNKNOWN" for host in hosts
    )
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(first=hosts[0].name, folder=folder, nodes=nodes, names=names))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    environment = {"SLURM_CONF": str(config)}
    daemons = []
    with (folder / "slurm.log").open("wb") as log:
        for host, name in ((hosts[0], "slurmctld"), *((host, "slurmd") for host in hosts)):
            command = (name, "-D", "-f", config)
            options = {"environment": environment, "stdout": log, "stderr": log}
            daemons.append(host.start(*command, **options))
    try:
        _wait_until_idle(hosts, environment)
        yield environment
    finally:
        for host in hosts:
            host.run("pkill", "-9", "-x", "slurmctld|slurmd|slurmstepd", check=False)
        for daemon in daemons:
            daemon.wait()


def _wait_until_idle(hosts: Sequence[Host], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    state = ""
    while time.monotonic() < deadline:
        command = ("sinfo", "--noheader", "--Node", "--format=%t")
        state = hosts[0].run(*command, environment=environment, check=False).stdout
        if state.split() == ["idle"] * len(hosts):
            return
        time.sleep(0.1)
    raise RuntimeError(f"Slurm's nodes were not idle after {WAIT_SECONDS:.0f} s: {state!r}")
