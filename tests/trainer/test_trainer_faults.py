# SPDX-License-Identifier: Apache-2.0
"""Processes that fail, hang or are killed: who ends, what is said, what goes on without them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from flora_dist.trainer.config import Config
from flora_dist.trainer.run import run
from tests.trainer.support import (
    ENVIRONMENT,
    ROOT,
    TINY,
    free_port,
    metrics,
    output_of,
    tiny_overrides,
    torchrun,
)

FLORA = "optimizer={name: flora, lr: 1e-2}"
TRACEBACK = "Traceback (most recent call last)"
# For a busy machine; none of the tests comes near it on a quiet one.
PATIENCE_S = 240.0


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Nothing of a test outlives it, stopped processes included."""
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
            process.communicate()


def wait_for_lines(folder: Path, lines: int, *processes: subprocess.Popen[str]) -> None:
    """Return when a run has written so many lines of metrics."""
    log, deadline = folder / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not log.exists() or log.read_text().count("\n") < lines:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no metrics"
        time.sleep(0.01)


def arguments(overrides: list[str]) -> list[str]:
    """The trainer's command line."""
    sets = [part for override in overrides for part in ("--set", override)]
    return ["--config", str(TINY), *sets]


def test_one_processs_failure_ends_all_with_its_traceback_shown_once(
    corpus: Path, tmp_path: Path
) -> None:
    overrides = tiny_overrides(corpus, tmp_path, "backend.name=ddp")
    process = torchrun(2, tmp_path / "logs", *overrides, module=["tests.trainer.failing", "1"])
    with ended(process):
        launcher = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode != 0
    said = [output_of(tmp_path / "logs", rank) for rank in (0, 1)]
    assert said[1].count(TRACEBACK) == 1
    assert said[1].rstrip().endswith("ZeroDivisionError: a fault of this process alone")
    assert TRACEBACK not in said[0]
    (line,) = (line for line in said[0].splitlines() if line.startswith("[process 0]"))
    assert line.startswith("[process 0] lost another process (Connection closed by peer")
    assert "look for its traceback" in line
    # torchrun's own traceback is of itself; its summary names the process whose fault it is.
    assert launcher.count(TRACEBACK) == 1
    root = launcher.partition("Root Cause")[2]
    assert "rank      : 1" in root
    assert "ZeroDivisionError: a fault of this process alone (its traceback is above)" in root


def test_a_process_that_hangs_ends_the_run_within_the_timeout(corpus: Path, tmp_path: Path) -> None:
    endless = ["train.steps=100000", "backend={name: fsdp2, timeout_minutes: 0.3}"]
    command = [sys.executable, "-m", "flora_dist.trainer"]
    command += arguments(tiny_overrides(corpus, tmp_path, *endless))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            command,
            env={**ENVIRONMENT, **meeting, "RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    with ended(*processes):
        wait_for_lines(tmp_path / "tiny", 2, *processes)
        processes[1].send_signal(signal.SIGSTOP)
        said = processes[0].communicate(timeout=PATIENCE_S)[0]  # below torch's own 30 minutes
        assert processes[0].returncode == 1
        assert "[process 0] lost another process (Timed out waiting 18000ms" in said
        assert TRACEBACK not in said


def agent(port: int, *overrides: str, host: bool) -> subprocess.Popen[str]:
    """One of two torchrun agents of an elastic job, with one process."""
    details = "last_call_timeout=5,join_timeout=200,keep_alive_interval=1,keep_alive_max_attempt=4"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"]
    command += ["--rdzv-conf", f"is_host={int(host)},{details}", "--local-addr", "127.0.0.1"]
    command += ["-m", "flora_dist.trainer", *arguments(list(overrides))]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    """The process that an agent has started in a world of two, once it is there."""
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children():
            if child.environ().get("WORLD_SIZE") == "2":
                return child
    return None


# By default tests/cluster loses a whole host of such a job; this one has the curves beside it.
@pytest.mark.slow
def test_an_elastic_job_loses_a_machine_and_goes_on_alone(
    corpus: Path, tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    steps = [FLORA, "train.steps=60", "evaluation.every=60"]
    saving = ["backend.name=fsdp2", "checkpoint={every: 5, resume: auto}"]
    overrides = tiny_overrides(corpus, tmp_path, *steps, *saving)
    port = free_port()
    agents = [agent(port, *overrides, host=host) for host in (True, False)]
    with ended(*agents):
        deadline = time.monotonic() + PATIENCE_S
        while (victim := worker_of(agents[1])) is None:
            assert agents[1].poll() is None, agents[1].communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        wait_for_lines(tmp_path / "tiny", 7, *agents)
        for doomed in (agents[1].pid, victim.pid):
            os.kill(doomed, signal.SIGKILL)
        said = agents[0].communicate(timeout=PATIENCE_S)[0]
    assert agents[0].returncode == 0, said
    assert "; 2 x cpu, fsdp2" in said
    assert "; 1 x cpu, fsdp2" in said.partition("lost another process")[2]
    assert "going on from" in said
    assert run(tiny(*steps, "output.name=alone")) == 0
    got, expected = metrics(tmp_path / "tiny"), metrics(tmp_path / "alone")
    assert [r["step"] for r in got] == [r["step"] for r in expected]
    # float32 sums in another order, 6e-8 each, through sixty steps whose errors add up.
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in expected], rel=1e-4)
