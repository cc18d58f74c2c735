# SPDX-License-Identifier: Apache-2.0
"""What happens to jobs on two hosts: they end with a reason within a minute and leave nothing."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.faults import FAULTS, LIMIT_S, START_S, after, power_off, terminate, training
from tests.cluster.hosts import hosts
from tests.cluster.jobs import LAUNCHERS, door, is_door, left_on, wait_until_clean

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(START_S + 2 * LIMIT_S + 60.0),
    pytest.mark.usefixtures("helper"),
]

# Every launcher and every fault, each where it once went wrong: DeepSpeed's openmpi launcher leaves
# its workers at SIGTERM, pdsh and mpirun wait for ever for a host that is gone, torchrun's agents
# for each other. The other pairs are slow.
EACH_COMMIT = {
    ("pdsh", "power off"),
    ("openmpi", "SIGTERM"),
    ("no_ssh", "worker kill -9"),
    ("torchrun", "cable down"),
    ("mpirun", "front door kill -9"),
    ("slurm", "worker kill -9"),
}
LOST = ("node2 no longer answers", "the job failed with exit code")
REASONS = {
    "worker kill -9": ("the job failed with exit code",),
    # Whoever notices first: the front door, or the launcher itself.
    "power off": LOST,
    "cable down": LOST,
    "SIGTERM": ("stopped by SIGTERM",),
    "front door kill -9": ("",),  # it can say nothing
}


def pairs() -> list[object]:
    every = [(launcher, fault) for launcher in LAUNCHERS for fault in FAULTS]
    return [
        pytest.param(*pair, marks=() if pair in EACH_COMMIT else pytest.mark.slow) for pair in every
    ]


@pytest.mark.parametrize(("launcher", "fault"), pairs())
def test_a_job_ends_with_a_reason_and_leaves_nothing(
    launcher: str, fault: str, tmp_path: Path, corpus: Path
) -> None:
    found = after(fault, launcher, tmp_path, corpus)
    assert found.code != 0
    assert not found.left
    assert any(reason in found.text for reason in REASONS[fault]), found.text[-8000:]
    if fault == "SIGTERM":  # the ranks were asked first, and saved
        assert any((tmp_path / "tiny" / "checkpoints").iterdir()), found.text[-8000:]


def test_an_elastic_job_goes_on_without_a_lost_host(tmp_path: Path, corpus: Path) -> None:
    """And SIGTERM then lets it save and end."""
    options, again = ("--least-nodes", "1"), ("--set", "checkpoint.resume=auto")
    with training("torchrun", tmp_path, corpus, options, again) as (on, running):
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        alive = power_off(on)
        before = metrics.read_text()
        running.wait_for(lambda: "goes on" in running.text(), LIMIT_S)
        # No step was saved yet: it begins again, alone.
        running.wait_for(lambda: metrics.exists() and metrics.read_text() != before, START_S)
        terminate(alive)
        assert running.code(LIMIT_S) == 143
        assert not wait_until_clean(alive, LIMIT_S)
        assert any((tmp_path / "tiny" / "checkpoints").iterdir())


def test_a_signal_before_the_hosts_have_answered_starts_nothing(tmp_path: Path) -> None:
    """It ended with a traceback of KeyboardInterrupt."""
    with hosts(2) as on:
        on[1].cable("down")
        running = door(on[0], tmp_path, "--nodes", "node1,node2", "no_such_program.py")
        running.wait_for(lambda: on[0].signal_all(is_door, signal.SIGTERM) == 1, START_S)
        assert running.code(LIMIT_S) in {143, -signal.SIGTERM}, running.text()
        assert "Traceback" not in running.text()
        assert not wait_until_clean(on, LIMIT_S)


def test_what_is_left_on_a_host_is_seen() -> None:
    with hosts(1) as on:
        left = on[0].start(sys.executable, "-c", "import time; time.sleep(1000)")
        deadline = time.monotonic() + LIMIT_S
        while not left_on(on):
            assert time.monotonic() < deadline
        assert list(wait_until_clean(on, 1.0)) == ["node1"]
        assert "time.sleep" in left_on(on)["node1"][0]
        left.kill()
