# SPDX-License-Identifier: Apache-2.0
"""Ranks that a real launcher started, used like a RankPool: one launch, many test bodies.

Each rank runs `serve_launched.py`, which takes task files from a folder and leaves results there.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.harness.ranks import RankError

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("serve_launched.py")
POLL_SECONDS = 0.02


def deepspeed_command(world_size: int) -> list[str]:
    """The deepspeed launcher, on this machine."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["--no_local_rank", "--num_accelerators", str(world_size)]
    return [str(launcher), *options, "--master_port", str(free_port()), str(SERVER)]


def torchrun_command(world_size: int) -> list[str]:
    """torchrun, on this machine."""
    module = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    options = ["--nproc-per-node", str(world_size), "--master-port", str(free_port())]
    return [*module, *options, str(SERVER)]


class LaunchedPool:
    """``world_size`` ranks under one launcher; started at the first call, again after a failure."""

    def __init__(self, command_of: Callable[[int], list[str]], world_size: int) -> None:
        self.world_size = world_size
        self._command_of = command_of
        self._launcher: subprocess.Popen[bytes] | None = None

    def __call__(self, body: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Run ``body(*args)`` on every rank; return the results in rank order.

        ``body`` must be a module-level function: it is sent to the ranks by name.
        """
        if self._launcher is None:
            self._start()
        self._count += 1
        task = self._folder / f"task-{self._count}"
        _write_whole(task, pickle.dumps((body, args)))
        try:
            return [
                self._result(rank, time.monotonic() + timeout) for rank in range(self.world_size)
            ]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the launcher and its ranks; the next call starts new ones."""
        if self._launcher is None:
            return
        # Launchers put their ranks into sessions of their own: a group's signal misses them.
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._launcher.pid).children(recursive=True)
            for process in (*family, self._launcher):
                process.kill()
            psutil.wait_procs(family)
        self._launcher.wait()
        self._launcher = None
        clear_locks(older_than=0.0)
        self._log.close()
        self._keep.cleanup()

    def _start(self) -> None:
        self._keep = tempfile.TemporaryDirectory()
        self._folder = Path(self._keep.name)
        self._count = 0
        self._log = (self._folder / "log").open("wb")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._launcher = subprocess.Popen(
            [*self._command_of(self.world_size), str(self._folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _result(self, rank: int, deadline: float) -> Any:
        path = self._folder / f"result-{self._count}-{rank}"
        assert self._launcher is not None
        while not path.exists():
            failed = next(self._folder.glob(f"failed-{self._count}-*"), None)
            if failed is not None:
                raise RankError(f"{failed.name} of {self.world_size}:\n{failed.read_text()}")
            if self._launcher.poll() is not None:
                raise RankError(
                    f"the launcher ended with {self._launcher.returncode}:{self._tail()}"
                )
            if time.monotonic() > deadline:
                raise RankError(f"no answer from rank {rank}:{self._tail()}")
            time.sleep(POLL_SECONDS)
        return pickle.loads(path.read_bytes())

    def _tail(self) -> str:
        return "\n" + (self._folder / "log").read_text(errors="replace")[-8000:]


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.replace(path)


def clear_locks(older_than: float) -> None:
    """Remove what killed ranks left; whoever loads a DeepSpeed helper waits for a lock for ever.

    Only in the tests' own folder (conftest.py). ``older_than``: seconds.
    """
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("lock"):
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime >= older_than:
                lock.unlink()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
