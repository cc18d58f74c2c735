# SPDX-License-Identifier: Apache-2.0
"""What tests on several hosts need of the machine: a missing tool fails them, none is skipped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.cluster.jobs import compile_helper

TOOLS = {
    "unshare": "util-linux",
    "ip": "iproute2",
    "iptables": "iptables",
    "/usr/sbin/sshd": "openssh-server",
    "ssh": "openssh-client",
    "pkill": "procps",
    "pdsh": "pdsh",
    "mpirun": "openmpi-bin",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
}


@pytest.fixture(autouse=True)
def _machine_has_what_hosts_need(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cluster") is None:
        return
    packages = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    assert not packages, f"apt-get install -y {' '.join(packages)}"
    assert os.geteuid() == 0, "hosts in namespaces need root"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text: the trainer then starts in seconds."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(f"line {n} of a text that says {n * n}\n\n" for n in range(3000)))
    return path


@pytest.fixture(scope="session")
def helper() -> None:
    """DeepSpeed's helper for the CPU is compiled."""
    compile_helper()
