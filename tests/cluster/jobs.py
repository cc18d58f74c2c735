# SPDX-License-Identifier: Apache-2.0
"""Jobs on the hosts, started as a person would: by the files in `launch/`, as shipped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora_dist.cluster.launch.locks import locks
from tests.cluster.hosts import Host

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "launch" / "run.sh"
SBATCH = ROOT / "launch" / "slurm.sbatch"
DEEPSPEED = ("pdsh", "openmpi", "no_ssh")
LAUNCHERS = (*DEEPSPEED, "torchrun", "mpirun", "slurm")
ZERO = (
    "{name: deepspeed, config: configs/deepspeed/zero2.json, changes: {optimizer: null, "
    "train_micro_batch_size_per_gpu: null, bf16: null, gradient_clipping: null}}"
)
# One thread a process: all hosts share the machine's cores. DeepSpeed's helper is compiled once.
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TORCH_EXTENSIONS_DIR": os.environ.get(
        "TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions")
    ),
}
POLL_SECONDS = 0.05
# Slurm's own, which outlive jobs; slurmstepd waits to tell a controller that it cannot reach.
_DAEMONS = ("slurmd", "slurmctld", ": slurm", "slurmscriptd", "slurmstepd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A front door that was started on a host."""

    door: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def code(self, timeout: float) -> int:
        """Its exit code; the text is in the error if it does not end."""
        try:
            return self.door.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not over after {timeout} s:\n{self.text()[-8000:]}") from None

    def wait_for(self, ready: Callable[[], bool], timeout: float) -> None:
        """Return when something has happened; an error if the job ends before."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self.door.poll() is not None:
                raise RuntimeError(f"ended with {self.door.returncode}:\n{self.text()[-8000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not there after {timeout} s:\n{self.text()[-8000:]}")
            time.sleep(POLL_SECONDS)


def compile_helper() -> None:
    """Compile DeepSpeed's helper for the CPU, a minute, where no job waits for it.

    A job that a test kills while it compiles leaves a lock for which the next one waits for ever.
    """
    folder = VARIABLES["TORCH_EXTENSIONS_DIR"]
    for lock in locks(folder):
        if not lock.is_held:
            Path(lock.path).unlink()
    code = (
        "from deepspeed.accelerator import get_accelerator as a; "
        "a().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
    )
    own = str(Path(sys.executable).parent)  # where the ninja is that jobs find
    environment = {**os.environ, **VARIABLES, "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{own}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def door(
    host: Host, folder: Path, *words: str | Path, environment: Mapping[str, str] | None = None
) -> Running:
    """Start `launch/run.sh` with these words on a host."""
    log = folder / f"log-{time.monotonic_ns()}"
    with log.open("wb") as output:
        process = host.start(
            RUN,
            *words,
            folder=ROOT,
            environment={**VARIABLES, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Running(door=process, log=log)


def nodes(launcher: str, hosts: Sequence[Host], slots: Sequence[int]) -> tuple[str, ...]:
    """The arguments that name hosts and processes: Slurm chooses hosts itself."""
    if launcher == "slurm":
        return ("--nodes", str(len(hosts)), "--slots", str(slots[0]))
    pairs = zip(hosts, slots, strict=True)
    return ("--nodes", ",".join(f"{host.name}:{number}" for host, number in pairs))


def trainer(folder: Path, corpus: Path, backend: str, *overrides: str) -> list[str]:
    """The words of a quick and quiet run of the trainer with Flora, which saves its last step."""
    settings = (
        f"data.corpus={corpus}",
        f"output.folder={folder}",
        "output.tensorboard=false",
        "output.progress=false",
        "optimizer={name: flora, lr: 1e-2, rank: 4, block: 32}",
        f"backend={backend}",
        *overrides,
    )
    words = ["-m", "flora_dist.trainer", "--config", "tests/trainer/tiny.yaml"]
    return words + [word for each in settings for word in ("--set", each)]


def backend_of(launcher: str) -> str:
    """DeepSpeed's launchers start DeepSpeed's engine, the others FSDP2."""
    return ZERO if launcher in DEEPSPEED else "{name: fsdp2}"


def is_rank(words: Sequence[str]) -> bool:
    """Whether a command line is that of a trainer's process, not of its launchers."""
    return list(words[1:4]) == ["-u", "-m", "flora_dist.trainer"]


def is_door(words: Sequence[str]) -> bool:
    """Whether it is the front door's."""
    return list(words[1:4]) == ["-m", "flora_dist.cli", "launch"]


def left_on(hosts: Sequence[Host]) -> dict[str, list[str]]:
    """What of jobs still runs on hosts, by their names; empty where nothing does."""
    found = {}
    for host in hosts:
        commands = [" ".join(words) for words in host.commands().values()]
        jobs = [command for command in commands if not command.startswith(_DAEMONS)]
        if jobs:
            found[host.name] = jobs
    return found


def wait_until_clean(hosts: Sequence[Host], timeout: float) -> dict[str, list[str]]:
    """What is left on hosts after at most ``timeout`` seconds; empty is clean."""
    deadline = time.monotonic() + timeout
    while (left := left_on(hosts)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return left
