# SPDX-License-Identifier: Apache-2.0
"""The ranks that a host runs for the doctor: started, heard, and ended in time whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

_POLL_S = 0.05
_GRACE_S = 2.0
"""After one has failed, for the others to say why they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    process_rank: int
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    errors: IO[bytes]

    def lines(self, stream: IO[bytes]) -> list[str]:
        stream.seek(0)
        return stream.read().decode(errors="replace").strip().splitlines()


class Children:
    """The ranks of one host."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._children: list[_Child] = []
        self._ended = False

    def run(
        self,
        ranks: Sequence[int],
        environment: Mapping[str, str],
        program: Sequence[str],
        limit_s: float,
    ) -> list[dict[str, Any]]:
        """Run them to their end, at most ``limit_s`` seconds; what each said.

        Args:
            ranks: process ranks of this host.
            environment: for all of them, over the host's own.
            program: words for Python.
            limit_s: after so long, or soon after one has failed, the others are ended.
        """
        with ExitStack() as files:
            children = self._start(ranks, environment, program, files)
            codes = self._wait(children, limit_s)
            return [_said(child, code) for child, code in zip(children, codes, strict=True)]

    def end(self) -> None:
        """End them, and start none any more."""
        with self._changing:
            self._ended = True
        self._kill()

    def _start(
        self,
        ranks: Sequence[int],
        environment: Mapping[str, str],
        program: Sequence[str],
        files: ExitStack,
    ) -> list[_Child]:
        with self._changing:
            if self._ended:
                return []
            for local_rank, process_rank in enumerate(ranks):
                place = {
                    "RANK": str(process_rank),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(len(ranks)),
                }
                variables = {**environment, **place}
                self._children.append(_started(process_rank, variables, program, files))
            return list(self._children)

    def _wait(self, children: Sequence[_Child], limit_s: float) -> list[int | None]:
        """Exit codes; None for those that had to be ended: they are not the cause."""
        deadline = time.monotonic() + limit_s
        failed = False
        while time.monotonic() < deadline:
            codes = [child.process.poll() for child in children]
            if None not in codes:
                break
            if any(codes) and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(_POLL_S)
        codes = [child.process.poll() for child in children]
        with self._changing:
            ended = self._ended
        self._kill()
        return [None if ended and code == -signal.SIGKILL else code for code in codes]

    def _kill(self) -> None:
        with self._changing:
            for child in self._children:
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()


def _started(
    process_rank: int, environment: Mapping[str, str], program: Sequence[str], files: ExitStack
) -> _Child:
    # Files, not pipes: a rank that says much must not wait for a reader.
    out = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    errors = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-u", *program],
        env={**os.environ, **environment},
        # It ends with this pipe: nobody writes to it, and it closes when this process is gone.
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=errors,
    )
    return _Child(process_rank=process_rank, process=process, out=out, errors=errors)


def _said(child: _Child, code: int | None) -> dict[str, Any]:
    """Its place, exit code (None: it was ended), last stage, result and last line of errors."""
    facts: dict[str, Any] = {"stage": "not started", "result": None}
    for line in child.lines(child.out):
        if line.startswith("{"):
            facts |= json.loads(line)
    errors = child.lines(child.errors)
    return {
        "process_rank": child.process_rank,
        "code": code,
        "stage": facts["stage"],
        "result": facts["result"],
        "error": errors[-1][:400] if errors else "",
    }
