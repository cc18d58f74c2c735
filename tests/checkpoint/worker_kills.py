# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a training process at random moments, under torchrun, which starts all of them again.

    python -m tests.checkpoint.worker_kills --times 20 --seed 0

Each run must finish with the loss curve of the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flora_dist.trainer.metrics import TIMED
from tests.trainer.support import ENVIRONMENT, ROOT, TINY

STEPS = 30
LEFT_OUT = {*TIMED, "gradient_norm"}
"""What two runs may differ in. The step whose traffic is counted has no norm, and after a resume
that is another step."""
PROCESSES = 2
SETUPS = {
    "fsdp2": ["backend.name=fsdp2"],
    "ddp, saved behind": ["backend.name=ddp", "checkpoint.asynchronous=true"],
}
# One start takes ten seconds on a quiet machine.
PATIENCE_S = 400.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill -9."""

    victim: int
    """The process."""
    line: int
    """It dies once so many lines of metrics are written, one a step,"""
    delay_s: float
    """and so much later: in a step, or in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has left."""

    curve: list[dict[str, Any]]
    """Of each step, all that does not depend on time."""
    starts: int
    """How often its processes were started."""
    resumed: list[str]
    """The checkpoints it went on from."""
    seconds: float
    """How long it took."""


def random_kills(number: int, seed: int) -> list[Kill]:
    """Kills at random steps, always the same for a seed."""
    rng = random.Random(seed)
    return [
        Kill(
            victim=rng.randrange(PROCESSES),
            line=rng.randint(1, STEPS - 5),
            delay_s=rng.uniform(0.0, 0.03),
        )
        for _ in range(number)
    ]


def train(setup: str, folder: Path, kills: Sequence[Kill]) -> Run:
    """Train tests/trainer/tiny.yaml under torchrun; each start meets one of the kills.

    Raises:
        AssertionError: it did not finish, or a kill came too late.
    """
    began, log = time.monotonic(), folder / "output"
    folder.mkdir(parents=True)
    with log.open("w") as output:
        launcher = subprocess.Popen(
            _command(setup, folder), cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output
        )
    try:
        for start, kill in enumerate(kills):
            _strike(launcher, start, kill, folder / "run" / "metrics.jsonl")
        code = launcher.wait(timeout=PATIENCE_S)
    finally:
        _end(launcher)
    said = log.read_text()
    assert code == 0, said
    starts = said.count(" parameters, vocabulary ")
    assert starts == 1 + len(kills), said
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return Run(
        curve=[
            {key: value for key, value in json.loads(line).items() if key not in LEFT_OUT}
            for line in lines
        ],
        starts=starts,
        resumed=[
            line.rpartition("/")[2] for line in said.splitlines() if line.startswith("going on")
        ],
        seconds=time.monotonic() - began,
    )


def _command(setup: str, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    command += ["--nproc-per-node", str(PROCESSES), "-m", "flora_dist.trainer"]
    command += ["--config", str(TINY)]
    for override in (
        *("optimizer={name: flora, lr: 1e-2}", f"train.steps={STEPS}", "evaluation.every=10"),
        *("checkpoint={every: 3, resume: auto}", f"output.folder={folder}", "output.name=run"),
        *("output.tensorboard=false", "output.progress=false"),
        *SETUPS[setup],
    ):
        command += ["--set", override]
    return command


def _strike(launcher: subprocess.Popen[bytes], start: int, kill: Kill, log: Path) -> None:
    """Kill one process of a start, once the run has come so far."""
    deadline, victim = time.monotonic() + PATIENCE_S, None
    while victim is None or not log.exists() or log.read_bytes().count(b"\n") < kill.line:
        assert launcher.poll() is None, "the run ended before the kill"
        assert time.monotonic() < deadline, "the run does not come so far"
        victim = victim or _worker(launcher.pid, start, kill.victim)
        time.sleep(0.002)
    time.sleep(kill.delay_s)
    victim.send_signal(signal.SIGKILL)


def _worker(launcher: int, start: int, number: int) -> psutil.Process | None:
    with suppress(psutil.Error):
        for child in psutil.Process(launcher).children():
            names = child.environ()
            mine = (names.get("TORCHELASTIC_RESTART_COUNT"), names.get("RANK"))
            if mine == (str(start), str(number)):
                return child
    return None


def _end(launcher: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher.pid).children(recursive=True):
            process.kill()
    launcher.kill()
    launcher.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    print("| run | setup | killed | after step | resumed from | seconds | curve |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        whole: dict[str, Run] = {}
        for number, kill in enumerate(random_kills(parsed.times, parsed.seed)):
            setup = list(SETUPS)[number % len(SETUPS)]
            if setup not in whole:
                whole[setup] = train(setup, Path(folder) / f"whole {setup}", [])
            run = train(setup, Path(folder) / str(number), [kill])
            equal = run.curve == whole[setup].curve
            wrong += not equal
            resumed = run.resumed[0] if run.resumed else "the beginning"
            print(
                f"| {number + 1} | {setup} | process {kill.victim} | {kill.line} | {resumed} | "
                f"{run.seconds:.0f} | {'equal bit for bit' if equal else 'DIFFERENT'} |",
                flush=True,
            )
    print(f"{parsed.times} runs, {wrong} with another curve; {os.cpu_count()} cores")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
