# SPDX-License-Identifier: Apache-2.0
"""Saves that are killed before one of their file operations, each in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from flora_dist.checkpoint import folder as folders

# Python tells of these before it does them. Between two of them the disk changes by nothing but
# bytes of files that are open, none of which has its final name yet.
_OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")
_PAYLOADS = ("__0_0.distcp", "__1_0.distcp", ".metadata")


@dataclass(frozen=True, kw_only=True)
class Save:
    """A checkpoint to be saved: its content says which."""

    tag: str
    content: str
    step: int = 1
    keep: int | None = None

    def into(self, folder: Path) -> None:
        partial = folders.begin(folder, self.tag)
        for name in _PAYLOADS:
            (partial / name).write_text(f"{self.content} {name}", encoding="utf-8")
        files = folders.hash_files(partial, _PAYLOADS)
        folders.write_manifest(
            partial,
            folders.Manifest(step=self.step, files=files, tensors={}, facts={"is": self.content}),
        )
        folders.publish(partial, self.tag, self.keep)


def content_of(checkpoint: Path) -> str:
    """What a checkpoint was saved with, after every check that a load makes."""
    manifest = folders.read_manifest(checkpoint)
    assert folders.verify_files(checkpoint, manifest, share=(0, 1)) is None, checkpoint
    content = manifest.facts["is"]
    assert isinstance(content, str)
    for name in _PAYLOADS:
        assert (checkpoint / name).read_text(encoding="utf-8") == f"{content} {name}"
    return content


def resolved(path: Path) -> str:
    """What is loaded from a path; a warning is not an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return content_of(folders.resolve(path))


def killed(work: Callable[[], None], after: int) -> bool:
    """Run ``work`` in a fork that is killed at its next file operation after so many.

    Returns:
        Whether it was; False: it came to its end before.
    """
    child = os.fork()
    if child == 0:
        left = after

        def kill_at_last(event: str, _: object) -> None:
            nonlocal left
            if event in _OPERATIONS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            # The disk's own time: a kill of the process does not ask for it.
            with patch("os.fsync"):
                sys.addaudithook(kill_at_last)
                work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, f"operation {after}: failed instead of being killed"
    return False


def run(saves: Sequence[Save], folder: Path) -> None:
    """Save some, undisturbed."""
    with patch("os.fsync"):
        for save in saves:
            save.into(folder)
