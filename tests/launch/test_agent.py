# SPDX-License-Identifier: Apache-2.0
"""The agent of a host: it ends what it started, whatever happens to its link."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from flora_dist.launch import agent
from flora_dist.launch.agent import SAYS, Task
from flora_dist.launch.processes import MARK, of_job, workers

SLEEPS = [sys.executable, "-c", "import time; time.sleep(1000)"]
# It ends neither by SIGTERM nor with its parent, and has a child of its own.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
time.sleep(1000)
"""
LIMIT_S = 30.0


def task(tmp_path: Path, command: list[str] | None, **changes: Any) -> Task:
    job = uuid.uuid4().hex
    settings = {
        **{"job": job, "folder": str(tmp_path), "environment": {MARK: job}, "command": command},
        **{"files_folder": str(tmp_path / "files"), "files": {}},
    }
    return Task(**{**settings, **changes})


class Agent:
    """One that runs here, spoken to as the front door does."""

    def __init__(self, given: Task, silence_s: float = agent.SILENCE_S) -> None:
        code = f"from flora_dist.launch import agent; agent.SILENCE_S = {silence_s}; agent.main()"
        self.job = given.job
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.say(json.dumps(asdict(given)))
        self.ready = self.heard()["ready"]

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def heard(self) -> dict[str, Any]:
        """The next thing it says, the command's own lines left out."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(SAYS):
                found: dict[str, Any] = json.loads(line.removeprefix(SAYS))
                return found
        raise AssertionError("it ended without a word")

    def wait_for(self, count: int) -> None:
        """Until the job has so many processes."""
        deadline = time.monotonic() + LIMIT_S
        while len(of_job(self.job)) != count:
            assert time.monotonic() < deadline, of_job(self.job)
            time.sleep(0.02)


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[Agent]:
    """An agent whose command has two processes that do not end by themselves."""
    started = Agent(task(tmp_path, [sys.executable, "-c", STUBBORN]))
    started.say("start")
    started.wait_for(2)
    yield started
    started.process.kill()
    started.process.wait()


def test_a_command_that_ends_is_told_with_its_code(tmp_path: Path) -> None:
    started = Agent(task(tmp_path, [sys.executable, "-c", "raise SystemExit(7)"]))
    started.say("start")
    assert started.heard() == {"ended": 7}
    started.say("end")
    assert started.heard() == {"left": 0}
    assert started.process.wait(LIMIT_S) == 0


def test_told_to_end_it_leaves_nothing(stubborn: Agent) -> None:
    stubborn.say("end")
    assert stubborn.heard() == {"left": 2}
    assert not of_job(stubborn.job)


def test_a_link_that_breaks_leaves_nothing(stubborn: Agent) -> None:
    assert stubborn.process.stdin is not None
    stubborn.process.stdin.close()
    stubborn.process.wait(LIMIT_S)
    assert not of_job(stubborn.job)


def test_a_link_that_falls_silent_leaves_nothing(tmp_path: Path) -> None:
    """A host behind a pulled cable: nothing closes the pipe."""
    started = Agent(task(tmp_path, SLEEPS), silence_s=1.0)
    started.say("start")
    started.wait_for(1)
    assert started.heard() == {"left": 1}
    assert not of_job(started.job)


def test_words_now_and_then_keep_the_link(tmp_path: Path) -> None:
    started = Agent(task(tmp_path, SLEEPS), silence_s=1.0)
    started.say("start")
    for _ in range(8):
        time.sleep(0.25)
        started.say("beat")
    assert started.process.poll() is None
    started.wait_for(1)
    started.say("end")
    started.process.wait(LIMIT_S)


def test_a_signal_of_the_terminal_does_not_end_it(stubborn: Agent) -> None:
    stubborn.process.send_signal(signal.SIGINT)
    stubborn.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert stubborn.process.poll() is None
    assert len(of_job(stubborn.job)) == 2


def test_only_what_launchers_started_as_ranks_is_asked_to_stop(tmp_path: Path) -> None:
    """A signal to a data loader's process would fail the rank that wants to save."""
    tree = """
import os, subprocess, sys, time
nap = [sys.executable, "-c", "import time; time.sleep(1000)"]
rank = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *nap]
subprocess.run(rank, env={**os.environ, "RANK": "0"})
"""
    started = Agent(task(tmp_path, [sys.executable, "-c", tree]))
    started.say("start")
    started.wait_for(3)
    found = of_job(started.job)
    [rank] = workers(found)
    assert [each.parent for each in found if each.has_rank and each != rank] == [rank.pid]
    started.say("end")
    started.process.wait(LIMIT_S)


def test_another_job_on_the_host_is_left_alone(tmp_path: Path, stubborn: Agent) -> None:
    other = Agent(task(tmp_path, SLEEPS))
    other.say("start")
    other.wait_for(1)
    other.say("end")
    other.process.wait(LIMIT_S)
    assert len(of_job(stubborn.job)) == 2


def test_the_files_of_a_command_are_there_meanwhile_and_its_owners_alone(tmp_path: Path) -> None:
    given = task(tmp_path, None, files={"hostfile": "node1 slots=1\n"})
    started = Agent(given)
    folder = Path(given.files_folder)
    assert (folder / "hostfile").read_text() == "node1 slots=1\n"
    assert folder.stat().st_mode & 0o777 == 0o700
    started.say("end")
    started.process.wait(LIMIT_S)
    assert not folder.exists()


def test_it_says_what_the_front_door_must_know(tmp_path: Path) -> None:
    started = Agent(task(tmp_path, None, folder="/no/such/folder"))
    assert started.ready["folder_exists"] is False
    started.say("end")
    started.process.wait(LIMIT_S)
