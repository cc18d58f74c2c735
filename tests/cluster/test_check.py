# SPDX-License-Identifier: Apache-2.0
"""What check.sh says where it may not install or make hosts: nothing is left out in silence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREPARE = "set -euo pipefail; source launch/_common.sh; source launch/_hosts.sh; prepare_hosts"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]

pytestmark = pytest.mark.cluster


def prepared(path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = f"PATH={path}; {PREPARE}" if path else PREPARE
    return subprocess.run(
        [*NOBODY, "bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_who_may_not_make_namespaces_is_told_what_is_left_out() -> None:
    done = prepared()
    assert done.returncode == 1
    assert "LEFT OUT" in done.stdout
    assert "sudo ./launch/check.sh -m cluster" in done.stdout


def test_who_may_not_install_is_told_the_packages() -> None:
    done = prepared(path="/nowhere")
    assert done.returncode == 1
    assert "sudo apt-get install -y" in done.stdout
    for package in ("pdsh", "openmpi-bin", "slurmctld", "slurmd"):
        assert package in done.stdout


def test_with_everything_there_nothing_is_left_out() -> None:
    done = subprocess.run(
        ["bash", "-c", PREPARE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_in_ci_leaving_out_is_a_failure() -> None:
    """check.sh says so before pytest starts."""
    text = (ROOT / "launch" / "check.sh").read_text()
    left_out = text.index("selected='not slow and not cluster'")
    assert text.index("[[ ${CI-} != true ]] || refuse") < left_out < text.index("-m pytest")
