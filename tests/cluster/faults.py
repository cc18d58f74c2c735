# SPDX-License-Identifier: Apache-2.0
"""Jobs on two hosts that something happens to, launcher by launcher; as a program, the whole table.

python -m tests.cluster.faults [--launcher NAME] [--fault NAME]
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Host, hosts
from tests.cluster.jobs import (
    LAUNCHERS,
    Running,
    backend_of,
    compile_helper,
    door,
    is_door,
    is_rank,
    nodes,
    trainer,
    wait_until_clean,
)
from tests.cluster.slurm import slurm

LIMIT_S = 60.0
"""Seconds within which a job must be over everywhere."""
START_S = 200.0
"""Nothing is asserted of how long a start takes on a busy machine."""
TIMEOUT_MINUTES = "0.4"
"""Of a rank's wait for others: what ends the ranks that Slurm alone looks after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a fault."""

    code: int
    seconds: float
    """From the fault to the front door's end."""
    clean_after: float
    """From the fault until nothing of the job ran on any host that has power."""
    left: dict[str, list[str]]
    """What still runs there after the limit."""
    text: str
    """All that the front door said."""

    @property
    def message(self) -> str:
        """Its own last line about the job."""
        said = [line for line in self.text.splitlines() if line.startswith("flora-dist launch:")]
        lines = [line for line in said if "what runs there" not in line]
        return lines[-1].removeprefix("flora-dist launch: ") if lines else ""


def kill_worker(on: Sequence[Host]) -> Sequence[Host]:
    """kill -9 of the second host's process."""
    assert on[1].signal_all(is_rank, signal.SIGKILL) == 1
    return on


def power_off(on: Sequence[Host]) -> Sequence[Host]:
    """The second host is gone, without a word to anybody."""
    on[1].power_off()
    return on[:1]


def cable_down(on: Sequence[Host]) -> Sequence[Host]:
    """The second host runs on and is cut off."""
    on[1].cable("down")
    return on


def terminate(on: Sequence[Host]) -> Sequence[Host]:
    """SIGTERM to the front door."""
    assert on[0].signal_all(is_door, signal.SIGTERM) == 1
    return on


def kill_door(on: Sequence[Host]) -> Sequence[Host]:
    """kill -9 of the front door: nobody is left to end the job."""
    assert on[0].signal_all(is_door, signal.SIGKILL) == 1
    return on


FAULTS: dict[str, Callable[[Sequence[Host]], Sequence[Host]]] = {
    "worker kill -9": kill_worker,
    "power off": power_off,
    "cable down": cable_down,
    "SIGTERM": terminate,
    "front door kill -9": kill_door,
}


@contextmanager
def training(
    launcher: str,
    folder: Path,
    corpus: Path,
    options: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> Iterator[tuple[list[Host], Running]]:
    """Two hosts on which the trainer has begun to step and would go on for hours.

    ``options`` are the front door's, ``arguments`` the trainer's.
    """
    endless = ("train.steps=1000000", "evaluation.every=1000000", "checkpoint.every=1000000")
    words = [*trainer(folder, corpus, backend_of(launcher), *endless), *arguments]
    with hosts(2) as on:
        where = ["--launcher", launcher, *nodes(launcher, on, [1, 1]), *options]
        command = [*where, "--timeout", TIMEOUT_MINUTES, *words]
        if launcher != "slurm":
            yield on, _begun(on, folder, command, {})
            return
        with slurm(on, folder) as environment:
            yield on, _begun(on, folder, command, environment)


def after(fault: str, launcher: str, folder: Path, corpus: Path) -> Outcome:
    """What a fault does to a job that a launcher has started."""
    with training(launcher, folder, corpus) as (on, running):
        started = time.monotonic()
        alive = FAULTS[fault](on)
        code = running.code(LIMIT_S)
        seconds = time.monotonic() - started
        left = wait_until_clean(alive, LIMIT_S - seconds)
        return Outcome(
            code=code,
            seconds=seconds,
            clean_after=time.monotonic() - started,
            left=left,
            text=running.text(),
        )


def _begun(
    on: Sequence[Host], folder: Path, command: Sequence[str], environment: dict[str, str]
) -> Running:
    running = door(on[0], folder, *command, environment=environment)
    metrics = folder / "tiny" / "metrics.jsonl"
    running.wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, START_S)
    return running


def main() -> None:
    """Print a row for every launcher and fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", choices=LAUNCHERS)
    parser.add_argument("--fault", choices=FAULTS)
    asked = parser.parse_args()
    compile_helper()
    sys.stdout.write("| launcher | fault | exit code | over after | clean after | last line |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for launcher in [asked.launcher] if asked.launcher else LAUNCHERS:
        for fault in [asked.fault] if asked.fault else FAULTS:
            with tempfile.TemporaryDirectory() as folder:
                corpus = Path(folder) / "corpus.txt"
                corpus.write_text("".join(f"line {n} says {n * n}\n\n" for n in range(3000)))
                found = after(fault, launcher, Path(folder), corpus)
            clean = f"{found.clean_after:.0f} s" if not found.left else f"LEFT {found.left}"
            row = (launcher, fault, found.code, f"{found.seconds:.0f} s", clean, found.message)
            sys.stdout.write(f"| {' | '.join(map(str, row))} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
