# SPDX-License-Identifier: Apache-2.0
"""Launchers and shorthands of the trainer's tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora_dist.checkpoint.folder import read_manifest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "trainer" / "tiny.yaml"

# One thread a process: the processes of one test share the machine's cores.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def tiny_overrides(corpus: Path, folder: Path, *overrides: str) -> list[str]:
    """Overrides for quick and quiet runs of tests/trainer/tiny.yaml."""
    return [
        f"data.corpus={corpus}",
        f"output.folder={folder}",
        "output.tensorboard=false",
        "output.progress=false",
        *overrides,
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """The files of a checkpoint's tensors by their hashes; `.metadata` has a number of its own."""
    files = read_manifest(checkpoint).files
    return {name: facts.sha256 for name, facts in files.items() if name.endswith(".distcp")}


def torchrun(
    processes: int,
    log_folder: Path,
    *overrides: str,
    module: Sequence[str] = ("flora_dist.trainer",),
) -> subprocess.Popen[str]:
    """Start the trainer under torchrun, each process's output in a file of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--redirects", "3", "--log-dir"]
    command += [str(log_folder), "-m", *module, "--config", str(TINY)]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def deepspeed_launch(processes: int, log_folder: Path, *overrides: str) -> int:
    """Run the trainer under the deepspeed launcher, each process's output in a file of its own."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(processes), "--no_local_rank"]
    command += ["--master_port", str(free_port()), "--enable_each_rank_log", str(log_folder)]
    command += ["--module", "flora_dist.trainer", "--config", str(TINY)]
    for override in overrides:
        command += ["--set", override]
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, check=False, timeout=240).returncode


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def output_of(log_folder: Path, process_rank: int) -> str:
    """What one process under torchrun wrote to stdout and stderr."""
    files = sorted(log_folder.glob(f"*/attempt_0/{process_rank}/std*.log"))
    assert len(files) == 2, files
    return "".join(file.read_text(encoding="utf-8") for file in files)


class Workers:
    """Runs tests/trainer/worker.py once per world size; its cases share the start of torch.

    Cases are `trained` or `saved`.
    """

    def __init__(self, corpus: Path, folder: Path) -> None:
        self._corpus, self._folder = corpus, folder
        self._done: dict[tuple[int, str], Path] = {}

    def __call__(self, world_size: int, cases: str = "trained") -> Path:
        """The folder with what the cases of this world size wrote."""
        key = (world_size, cases)
        if key not in self._done:
            self._done[key] = self._launch(world_size, cases)
        return self._done[key]

    def _launch(self, world_size: int, cases: str) -> Path:
        folder = self._folder / f"{cases}.{world_size}"
        folder.mkdir()
        arguments = [str(folder), str(self._corpus), cases]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.trainer.worker", *arguments],
                env={
                    **ENVIRONMENT,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                },
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [process.communicate(timeout=285)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        codes = [process.returncode for process in processes]
        assert codes == [0] * world_size, "\n".join(outputs)
        return folder
