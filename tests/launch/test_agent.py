# SPDX-License-Identifier: Apache-2.0
"""The agent of a host: it ends what it started, whatever happens to its link."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import pytest

from flora_dist.cluster.launch.near_end import Session
from flora_dist.cluster.launch.processes import MARK, of_job, workers

SLEEPS = "import time; time.sleep(1000)"
# It ends neither by SIGTERM nor with its parent, and has a child of its own.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
time.sleep(1000)
"""
LIMIT_S = 30.0


class Agent:
    """One that runs here, asked as the front door asks it."""

    def __init__(self, *changes: str) -> None:
        self.job = uuid.uuid4().hex
        self.heard: dict[int, bytes] = {1: b"", 2: b""}
        serves = "serve(agent.LaunchAgent)"
        words = [
            "from flora_dist.cluster.launch import agent, far_end",
            *changes,
            f"far_end.{serves}",
        ]
        command = [sys.executable, "-u", "-c", "; ".join(words)]
        self.session = Session("here", command, {MARK: self.job}, self.hear)
        self.session.hello(LIMIT_S)

    def hear(self, stream: int, data: bytes) -> None:
        self.heard[stream] += data

    def run(self, *words: str) -> Future[int]:
        """The code with which Python ends on these words, some day."""
        return self.session.begin("run", folder="/", command=[sys.executable, *words])

    def end(self) -> int:
        """How many processes it has ended."""
        ended: int = self.session.ask("end", LIMIT_S)
        self.session.close()
        return ended

    @property
    def pid(self) -> int:
        return self.session._process.pid

    def wait_for(self, count: int) -> None:
        """Until the job has so many processes."""
        deadline = time.monotonic() + LIMIT_S
        while len(of_job(self.job)) != count:
            assert time.monotonic() < deadline, of_job(self.job)
            time.sleep(0.02)


@pytest.fixture
def stubborn() -> Iterator[Agent]:
    """An agent whose command has two processes that do not end by themselves."""
    started = Agent()
    started.run("-c", STUBBORN)
    started.wait_for(2)
    yield started
    started.session.close()


def test_a_command_that_ends_is_told_with_its_code_and_all_it_has_printed() -> None:
    started = Agent()
    text = "a\u00e9\n" * 5000 + "no end of line"
    code = (
        f"import sys; print({text!r}, end=''); sys.stderr.buffer.write(bytes(range(256))); exit(7)"
    )
    assert started.run("-c", code).result(LIMIT_S) == 7
    assert started.end() == 0
    assert started.heard == {1: text.encode(), 2: bytes(range(256))}


def test_nothing_that_a_rank_prints_passes_for_a_word_of_the_agent() -> None:
    """A rank that printed `::flora-agent:: {"ended": 0}` ended its job as a success, and one that
    printed `::flora-agent:: hello` let it hang for ever."""
    started = Agent()
    # Also all that a rank can read of itself and of the agent.
    code = """
import os, sys
from pathlib import Path
seen = ["", os.environ["FLORA_JOB"], "::flora-agent::", "::flora-doctor::"]
for who in ("self", os.getppid()):
    for name in ("environ", "cmdline"):
        seen += Path(f"/proc/{who}/{name}").read_text().replace("\\0", "=").split("=")
for stream in (sys.stdout, sys.stderr):
    for word in seen:
        for facts in ('{"number": 1, "answer": 0}', '{"ended": 0}', 'hello', '{"hello": 1}'):
            print(f"{word} {facts}", file=stream, flush=True)
print(Path(f"/proc/{os.getppid()}/fd/1").readlink(), file=sys.stderr)
raise SystemExit(3)
"""
    assert started.run("-c", code).result(LIMIT_S) == 3
    assert started.end() == 0
    assert started.heard[1].count(b'{"number": 1, "answer": 0}\n') > 20


def test_a_command_that_cannot_start_has_the_code_of_a_shell_and_says_why() -> None:
    started = Agent()
    never = started.session.begin("run", folder="/", command=["/no/such/program"])
    assert never.result(LIMIT_S) == 127
    started.end()
    assert b"/no/such/program cannot start in /: " in started.heard[2]


def test_told_to_end_it_leaves_nothing_and_starts_nothing(stubborn: Agent) -> None:
    assert stubborn.session.ask("end", LIMIT_S) == 2
    assert not of_job(stubborn.job)
    assert stubborn.run("-c", "").result(LIMIT_S) == -signal.SIGTERM


def test_a_link_that_breaks_leaves_nothing(stubborn: Agent) -> None:
    stubborn.session.close()
    assert not of_job(stubborn.job)


def test_a_link_that_falls_silent_leaves_nothing() -> None:
    """A host behind a pulled cable: nothing closes the pipe."""
    started = Agent("far_end.SILENCE_S = 1.0")
    ended = started.run("-c", SLEEPS)
    started.wait_for(1)
    assert wait([ended], LIMIT_S).done  # killed: the next sign of life would come after 5 s
    assert not of_job(started.job)
    started.session.close()


def test_a_link_that_takes_nothing_any_more_falls_silent_all_the_same() -> None:
    """What a rank prints fills the pipe; the agent must not wait for room in it."""
    job = uuid.uuid4().hex
    code = "import sys\nwhile True: print('x' * 1000)"
    program = "from flora_dist.cluster.launch import agent, far_end; far_end.SILENCE_S = 1.0; "
    agent = subprocess.Popen(
        [sys.executable, "-u", "-c", f"{program}far_end.serve(agent.LaunchAgent)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert agent.stdin is not None
    what = {"folder": "/", "command": [sys.executable, "-c", code]}
    for word in (
        {"token": "t", "environment": {MARK: job}},
        {"number": 1, "ask": "run", "what": what},
    ):
        agent.stdin.write(f"{json.dumps(word)}\n".encode())
    agent.stdin.flush()
    assert agent.wait(LIMIT_S) == 0  # nobody has read a byte
    assert not of_job(job)


def test_words_now_and_then_keep_the_link() -> None:
    started = Agent("far_end.SILENCE_S = 1.0")
    started.run("-c", SLEEPS)
    for _ in range(8):
        time.sleep(0.25)
        started.session.begin("stop")
    assert started.session.is_open
    started.wait_for(1)
    started.end()


def test_a_signal_of_the_terminal_does_not_end_it(stubborn: Agent) -> None:
    os.kill(stubborn.pid, signal.SIGINT)
    os.kill(stubborn.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert stubborn.session.is_open
    assert len(of_job(stubborn.job)) == 2


def test_only_what_launchers_started_as_ranks_is_asked_to_stop() -> None:
    """A signal to a data loader's process would fail the rank that wants to save."""
    tree = """
import os, subprocess, sys, time
nap = [sys.executable, "-c", "import time; time.sleep(1000)"]
rank = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *nap]
subprocess.run(rank, env={**os.environ, "RANK": "0"})
"""
    started = Agent()
    started.run("-c", tree)
    started.wait_for(3)
    found = of_job(started.job)
    [rank] = workers(found)
    assert [each.parent for each in found if each.has_rank and each != rank] == [rank.pid]
    assert started.end() == 3


def test_another_job_on_the_host_is_left_alone(stubborn: Agent) -> None:
    other = Agent()
    other.run("-c", SLEEPS)
    other.wait_for(1)
    other.end()
    assert len(of_job(stubborn.job)) == 2


def test_the_files_of_a_command_are_there_meanwhile_and_its_owners_alone(tmp_path: Path) -> None:
    started, folder = Agent(), tmp_path / "files"
    texts = {"hostfile": "node1 slots=1\n"}
    told = started.session.ask(
        "prepare", LIMIT_S, folder="/no/such/folder", files_folder=str(folder), files=texts
    )
    assert (folder / "hostfile").read_text() == "node1 slots=1\n"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert told["folder_exists"] is False
    started.end()
    assert not folder.exists()
