# SPDX-License-Identifier: Apache-2.0
"""Who waits for torch's build lock is told so, and under the front door does not wait for ever.

An `initialize` that met the lock of a killed compilation waited for ever without a word.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from flora_dist.cluster.launch.locks import may_wait_for_locks
from flora_dist.cluster.launch.near_end import Session
from flora_dist.cluster.launch.worker import refuse_stale_locks
from flora_dist.frameworks import build_lock
from flora_dist.frameworks.build_lock import telling
from flora_dist.world import MARK

LIMIT_S = 30.0


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that nobody holds, from long ago."""
    monkeypatch.setattr(build_lock, "SAY_S", 0.1)
    monkeypatch.setattr(build_lock, "_POLL_S", 0.05)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv(MARK, raising=False)
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    path.touch()
    os.utime(path, (time.time() - 900,) * 2)
    return path


@pytest.fixture
def owner(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock until it is ended."""
    code = "import sys, time; held = open(sys.argv[1]); print(flush=True); time.sleep(1000)"
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


class Told:
    """A wait for the lock, which is removed when something has been said."""

    def __init__(self, lock: Path, said: list[str], capfd: pytest.CaptureFixture[str]) -> None:
        self.said = said
        threading.Thread(target=self._release, args=(lock, capfd), daemon=True).start()
        with telling():
            FileBaton(str(lock)).wait()

    def _release(self, lock: Path, capfd: pytest.CaptureFixture[str]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not "".join(self.said) and time.monotonic() < deadline:
            self.said.append(capfd.readouterr().err)
            time.sleep(0.05)
        lock.unlink()


def test_a_wait_is_told_with_the_lock_its_age_and_how_to_clear_it(
    lock: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "".join(Told(lock, [], capfd).said)
    assert re.search(rf"waiting: the lock {lock}, 9\d\d s old, is held by no process", said)
    assert said.endswith(f"Remove it: rm {lock}.\n")


def test_a_lock_that_somebody_holds_is_waited_for_and_told_with_its_owner(
    lock: Path,
    owner: subprocess.Popen[bytes],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MARK, "job")
    said = "".join(Told(lock, [], capfd).said)
    assert f"is held by process {owner.pid} ({sys.executable} -c " in said
    assert "wait for it, or end it" in said


def test_under_the_front_door_a_stale_lock_ends_the_wait(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, "job")
    words = f"without end; the lock {lock}.*Remove it: rm {lock}"
    with pytest.raises(ValueError, match=words), telling():
        FileBaton(str(lock)).wait()
    assert lock.exists(), "whose it is, a person decides"


def test_a_rank_that_no_agent_watches_refuses_a_stale_lock(lock: Path) -> None:
    with pytest.raises(ValueError, match=f"a killed job has left a lock.*rm {lock}"):
        refuse_stale_locks({"TORCH_EXTENSIONS_DIR": str(lock.parents[1])})
    os.utime(lock)
    refuse_stale_locks({"TORCH_EXTENSIONS_DIR": str(lock.parents[1])})


def test_only_a_program_that_may_compile_has_to_do_with_locks(tmp_path: Path) -> None:
    plain, engine = tmp_path / "plain.yaml", tmp_path / "engine.yaml"
    plain.write_text("backend: {name: fsdp2}\n")
    engine.write_text("backend: {name: deepspeed, config: zero2.json}\n")
    trainer = ["-m", "flora_dist.trainer"]
    assert not may_wait_for_locks([*trainer, "--config", str(plain)])
    assert not may_wait_for_locks([*trainer, f"--config={plain}", "--set", "backend.name=ddp"])
    assert may_wait_for_locks([*trainer, "--config", str(engine)])
    assert may_wait_for_locks(
        [*trainer, "--config", str(plain), "--set", "backend={name: deepspeed, config: x}"]
    )
    assert may_wait_for_locks([*trainer, "--config", str(tmp_path / "none.yaml")])
    assert may_wait_for_locks(["train.py"])


def test_a_stale_lock_ends_a_job_before_it_starts_only_where_it_may_compile(
    lock: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("backend: {name: ddp}\n")
    door = [sys.executable, "-m", "flora_dist.cli", "launch", "--launcher", "torchrun"]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(lock.parents[1])}

    def say(*words: str) -> str:
        done = subprocess.run(
            [*door, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode
        return done.stderr

    script = tmp_path / "script.py"
    script.write_text("")
    refused = say(str(script))
    assert f"Remove it: rm {lock}" in refused
    assert "ssh" not in refused
    started = say("-m", "flora_dist.trainer", "--config", str(config))
    assert "model is required and missing" in started
    assert str(lock) not in started


def test_the_agent_tells_of_a_lock_that_stays_while_its_job_runs(lock: Path) -> None:
    heard: list[bytes] = []
    words = (
        "from flora_dist.cluster.launch import agent, far_end; agent.SAY_S = agent._LOOK_S = 0.1"
    )
    session = Session(
        "here",
        [sys.executable, "-u", "-c", f"{words}; far_end.serve(agent.LaunchAgent)"],
        {MARK: "no such job", "TORCH_EXTENSIONS_DIR": str(lock.parents[1])},
        lambda _stream, data: heard.append(data),
    )
    session.ask("prepare", LIMIT_S, folder="/", files_folder="/nowhere", files={})
    deadline = time.monotonic() + LIMIT_S
    while not heard and time.monotonic() < deadline:
        time.sleep(0.02)
    session.close()
    assert f"rm {lock}." in b"".join(heard).decode()
