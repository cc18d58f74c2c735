# SPDX-License-Identifier: Apache-2.0
"""The agent of one host: runs that host's part of a job, and leaves nothing of it behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from flora_dist.cluster.launch.far_end import Voice, serve
from flora_dist.cluster.launch.files import kept
from flora_dist.cluster.launch.locks import locks
from flora_dist.cluster.launch.outlet import pump
from flora_dist.cluster.launch.processes import MARK, end_all, of_job, signal_each, workers
from flora_dist.frameworks.build_lock import SAY_S, words

_PATIENCE_S = 3.0
_LAST_LINES_S = 1.0
_LOOK_S = 5.0
_CANNOT_START = 127


class LaunchAgent:
    """A job's part on this host."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._job = os.environ[MARK]
        self._files = ExitStack()
        self._pumps: list[threading.Thread] = []
        self._changing = threading.Lock()
        self._over = False

    def asks(self) -> Mapping[str, Callable[..., Any]]:
        """By name, what may be asked."""
        return {"prepare": self.prepare, "run": self.run, "stop": self.stop, "end": self.end}

    def prepare(self, folder: str, files_folder: str, files: Mapping[str, str]) -> dict[str, Any]:
        """What the front door must know of this host before anything starts.

        Args:
            folder: where the job runs.
            files_folder: of the texts that its command reads here.
            files: these, by name.
        """
        with self._changing:
            if not self._over:
                self._files.enter_context(kept(Path(files_folder), files))
                threading.Thread(target=self._watch_locks, daemon=True).start()
        return {
            "folder_exists": Path(folder).is_dir(),
            "locks": [asdict(lock) for lock in locks()],
        }

    def run(self, folder: str, command: Sequence[str]) -> int:
        """Run it to its end; its code, that of Popen, or a shell's 127 where it cannot start."""
        with self._changing:
            if self._over:
                return -signal.SIGTERM
            try:
                child = self._started(folder, command)
            except OSError as error:
                self._voice.pass_on(2, f"{command[0]} cannot start in {folder}: {error}\n".encode())
                return _CANNOT_START
        return child.wait()

    def _started(self, folder: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C of the terminal is the front door's
        )
        for stream, pipe in ((1, child.stdout), (2, child.stderr)):
            assert pipe is not None
            self._pumps.append(pump(pipe, partial(self._voice.pass_on, stream)))
        return child

    def _watch_locks(self) -> None:
        """Tell of a lock that stays: no rank says that it waits for one."""
        seen: dict[str, float] = {}
        while not self._over:
            time.sleep(_LOOK_S)
            now = {lock.path: lock for lock in locks()}
            seen = {path: seen.get(path, time.monotonic()) for path in now}
            for path, since in seen.items():
                if time.monotonic() - since >= SAY_S:
                    seen[path] = math.inf  # once
                    text = words(path, now[path].age_s, now[path].owner)
                    line = f"flora-dist launch: ranks that compile with DeepSpeed wait; {text}.\n"
                    self._voice.pass_on(2, line.encode())

    def stop(self) -> None:
        """Ask the ranks to save and end."""
        signal_each(workers(of_job(self._job)), signal.SIGTERM)

    def end(self) -> int:
        """End what is left of the job, whoever started it; how many processes there were."""
        with self._changing:
            self._over = True
            ended = end_all(self._job, patience_s=_PATIENCE_S)
            for thread in self._pumps:
                thread.join(_LAST_LINES_S)
            self._files.close()
        return ended


if __name__ == "__main__":
    serve(LaunchAgent)
