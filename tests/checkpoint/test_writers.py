# SPDX-License-Identifier: Apache-2.0
"""More than one save in a folder: of two jobs, of dead ones, of one process's threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from flora_dist import checkpoint
from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint import owners
from flora_dist.checkpoint.convert.whole import Whole, write_file
from flora_dist.checkpoint.lock import locked
from tests.checkpoint.kills import Save, content_of, resolved, run
from tests.checkpoint.small import start
from tests.checkpoint.two_writers import LOADED, SAVED, bad, compete
from tests.conftest import pool_of

A, B = (Save(tag=f"step-0000000{n}", content=f"{n}", step=n) for n in (1, 2))


def dotted(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_save_that_another_overtakes_publishes_what_it_wrote_itself(tmp_path: Path) -> None:
    """Two jobs saved one tag, the first one delayed between writing and hashing.

    It published its own manifest over the other's tensors, with hashes that fitted, and that
    loaded: the run went on with another run's weights.
    """
    ours, theirs = start(data=0), start(data=1)
    ours.train([1])
    theirs.train([1, 2])
    hash_files, waiting = folders.hash_files, [theirs]

    def late(partial: Path, names: Iterable[str]) -> dict[str, folders.FileFacts]:
        if waiting:
            other = waiting.pop()
            checkpoint.save(tmp_path, other.model, other.optimizer, step=1, extra={"who": 1})
        return hash_files(partial, names)

    with patch.object(folders, "hash_files", late):
        checkpoint.save(tmp_path, ours.model, ours.optimizer, step=1, extra={"who": 0})
    fresh = start(data=2)
    assert checkpoint.load(tmp_path, fresh.model, fresh.optimizer).extra == {"who": 0}
    assert fresh.state() == ours.state()
    assert dotted(tmp_path) == []


def test_two_writers_and_a_reader_never_meet_a_mixed_checkpoint() -> None:
    """Of two jobs' saves 89 of 111 were refused, and ``latest`` named damaged checkpoints."""
    found = compete(saves=6, seed=1)
    assert bad(found) == []
    assert found[SAVED] == 12
    assert found[LOADED] > 0


def test_a_load_whose_checkpoint_is_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    """Between hashing and reading a save of the same tag came: its tensors passed for hashed."""
    ours, theirs, running = start(data=0), start(data=1), start(data=2)
    for one in (ours, theirs):
        one.train([1])
    path = checkpoint.save(tmp_path, ours.model, ours.optimizer, step=1)
    verify_files, waiting = folders.verify_files, [theirs]

    def then_replaced(*arguments: object, **more: object) -> str | None:
        found = verify_files(*arguments, **more)  # type: ignore[arg-type]
        if waiting and "__0_0.distcp" in arguments[1].files:  # type: ignore[attr-defined]
            other = waiting.pop()
            checkpoint.save(tmp_path, other.model, other.optimizer, step=1)
        return found

    before = running.state()
    with (
        patch.object(folders, "verify_files", then_replaced),
        pytest.raises(ValueError, match="was replaced or removed meanwhile"),
    ):
        checkpoint.load(path, running.model, running.optimizer)
    assert waiting == []
    assert running.state() == before


# ---- who is told, and whose leftovers go


@contextmanager
def another_process() -> Iterator[int]:
    """A living one; its number."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def partial_of(folder: Path, pid: int, *, started: int | None = None, machine: str = "") -> Path:
    """What a save of some process has begun."""
    when = owners._started(pid) if started is None else started
    token = f"{machine or owners._machine()}-{pid}-{when}-00000000"
    path = folder / f".{B.tag}.{token}.partial"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_text("half")
    return path


def aged(path: Path) -> Path:
    """As if nothing had been written there for a day."""
    then = time.time() - 86400.0
    for each in (*path.glob("*"), path):
        os.utime(each, (then, then))
    return path


def test_a_second_writer_is_told_and_nothing_of_the_other_is_touched(tmp_path: Path) -> None:
    with another_process() as pid:
        partial = aged(partial_of(tmp_path, pid))
        with pytest.warns(UserWarning, match=r"another process is writing 'step-00000002' into .*"):
            run([A], tmp_path)
        assert (partial / "__0_0.distcp").read_text() == "half"
    run([A], tmp_path)
    assert dotted(tmp_path) == []


def test_what_a_process_with_a_dead_ones_number_writes_is_its_own(tmp_path: Path) -> None:
    with another_process() as pid:
        partial = partial_of(tmp_path, pid, started=1)
        run([A], tmp_path)
    assert not partial.exists()


def test_another_machines_partial_goes_when_it_has_been_silent_for_long(tmp_path: Path) -> None:
    young = partial_of(tmp_path / "young", 1, machine="0" * 8)
    old = aged(partial_of(tmp_path / "old", 1, machine="0" * 8))
    with pytest.warns(UserWarning, match="another process is writing"):
        run([A], tmp_path / "young")
    run([A], tmp_path / "old")
    assert (young.exists(), old.exists()) == (True, False)


def test_a_leftover_of_an_earlier_version_goes_when_it_is_old_and_all_ours(tmp_path: Path) -> None:
    ours, theirs, young = (tmp_path / f".{name}.partial" for name in ("ours", "theirs", "young"))
    for path in (ours, theirs, young):
        path.mkdir()
        (path / "__0_0.distcp").touch()
    (theirs / "thesis.tex").touch()
    for path in (ours, theirs):
        aged(path)
    with pytest.warns(UserWarning, match="is writing 'young'"):
        run([A], tmp_path)
    assert dotted(tmp_path) == [theirs.name, young.name]


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    run([A], tmp_path)
    one = start(data=0)
    with (
        patch.object(folders, "hash_files", side_effect=OSError(28, "No space left on device")),
        pytest.raises(ValueError, match="No space left"),
    ):
        checkpoint.save(tmp_path, one.model, one.optimizer, step=2)
    assert dotted(tmp_path) == []
    assert resolved(tmp_path) == A.content


def test_a_save_whose_files_somebody_clears_is_not_published(tmp_path: Path) -> None:
    """An older version beside it erases every partial: an empty one must not become newest."""
    run([A], tmp_path)
    write_manifest = folders.write_manifest

    def then_cleared(partial: Path, manifest: folders.Manifest) -> None:
        write_manifest(partial, manifest)
        (partial / "__0_0.distcp").unlink()

    with (
        patch.object(folders, "write_manifest", then_cleared),
        pytest.raises(ValueError, match="some are gone or changed"),
    ):
        run([B], tmp_path)
    assert resolved(tmp_path) == A.content


def test_saves_of_one_process_side_by_side_disturb_nobody(tmp_path: Path) -> None:
    one = start(data=0)
    one.train([1])
    behind = checkpoint.save_async(tmp_path, one.model, one.optimizer, step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.save(tmp_path, one.model, one.optimizer, step=2)
    behind.wait()
    for tag in (A.tag, B.tag):
        checkpoint.load(tmp_path / tag, one.model, one.optimizer)


def test_the_lock_is_waited_for_and_a_dead_holder_gives_it_back(tmp_path: Path) -> None:
    code = (
        f"import fcntl; file = open({str(tmp_path / '.lock')!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == b"\n"
        with (
            patch("flora_dist.checkpoint.lock._PATIENCE_SECONDS", 0.0),
            pytest.raises(ValueError, match=r"another process has held '.*\.lock'"),
            locked(tmp_path),
        ):
            raise AssertionError("it was held")
        holder.kill()
        holder.wait()
    run([A], tmp_path)
    assert dotted(tmp_path) == []


def test_two_conversions_to_one_file_write_each_into_its_own(tmp_path: Path) -> None:
    nothing = Whole(step=1, tensors={}, shapes={}, counters={}, groups=[], extra={})
    with patch("torch.save", side_effect=lambda _, stream: stream.write(b"x")):
        file = write_file(nothing, tmp_path / "file.pt")
        full = OSError(28, "No space left")
        with (
            patch.object(Path, "replace", side_effect=full),
            pytest.raises(OSError, match="No space left"),
        ):
            write_file(nothing, tmp_path / "file.pt")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


# ---- ranks that differ


def _different_steps(folder: Path) -> str:
    one = start(data=0)
    try:
        checkpoint.save(folder, one.model, one.optimizer, step=1 + dist.get_rank())
    except ValueError as error:
        return str(error)
    return "saved"


@pytest.mark.ranks(2)
def test_ranks_that_name_two_checkpoints_are_refused_together(tmp_path: Path) -> None:
    errors = pool_of(2)(_different_steps, tmp_path)
    assert all("('step-00000001', 1) on rank 0" in error for error in errors), errors
    assert list(tmp_path.iterdir()) == []


# ---- a checkpoint that was moved aside by an earlier version


def test_a_replacing_that_an_earlier_version_began_is_finished(tmp_path: Path) -> None:
    run([A, B], tmp_path)
    shutil.move(tmp_path / B.tag, tmp_path / f".{B.tag}.previous")
    assert resolved(tmp_path) == B.content
    run([A], tmp_path)
    assert content_of(tmp_path / B.tag) == B.content
    assert dotted(tmp_path) == []
