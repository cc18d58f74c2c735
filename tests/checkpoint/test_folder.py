# SPDX-License-Identifier: Apache-2.0
"""A folder of checkpoints: kills at every file operation, replacing, keeping some, ``latest``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint import leftovers
from flora_dist.checkpoint.owners import TOKEN
from tests.checkpoint.kills import Save, content_of, killed, resolved, run

A, B, C = (Save(tag=f"step-0000000{n}", content=f"{n}", step=n) for n in (1, 2, 3))
# What was there; the save that is killed.
SCENES: dict[str, tuple[Sequence[Save], Save]] = {
    "the first": ([], A),
    "another": ([A, B], C),
    "the newest again": ([A, B], Save(tag=B.tag, content="new", step=2)),
    "an older again": ([A, B], Save(tag=A.tag, content="new", step=1)),
    "and keep one": ([A, B], Save(tag=C.tag, content="new", step=3, keep=1)),
    "again and keep two": ([A, B, C], Save(tag=A.tag, content="new", step=1, keep=2)),
}


def dotted(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def visible(folder: Path) -> dict[str, str]:
    """Contents by tag; every folder without a dot must be whole."""
    return {
        path.name: content_of(path)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }


def check_after_kill(folder: Path, before: Sequence[Save], save: Save) -> None:
    """The old or the new one loads, nothing visible is torn, and the next save mends the rest."""
    if not folders.has_checkpoint(folder):
        assert not before, "nothing is left"
        return
    assert resolved(folder) in {save.content, *(old.content for old in before[-1:])}
    found = visible(folder)
    for old in before:
        if old.tag == save.tag:
            assert resolved(folder / old.tag) in {old.content, save.content}
        elif save.keep is None:
            assert found[old.tag] == old.content


def kill_everywhere(
    tmp_path: Path, before: Sequence[Save], save: Save, *, every: int = 1
) -> list[Path]:
    """The folders that kills at every, or every third, operation have left, checked."""
    left = []
    for number in range(0, 10_000, every):
        folder = tmp_path / f"{number}"
        run(before, folder)
        was_killed = killed(lambda folder=folder: save.into(folder), number)  # type: ignore[misc]
        check_after_kill(folder, before, save)
        if not was_killed:
            assert number > 20, "kills were not counted"
            return left
        left.append(folder)
    raise AssertionError("it never ended")


@pytest.mark.parametrize("scene", SCENES)
def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_one(
    scene: str, tmp_path: Path
) -> None:
    before, save = SCENES[scene]
    for folder in kill_everywhere(tmp_path, before, save):
        expected = dict.fromkeys({old.tag for old in before} | {save.tag})
        # The next save finishes what was begun.
        run([save], folder)
        assert resolved(folder) == save.content
        assert dotted(folder) == []
        if save.keep is None:
            assert set(visible(folder)) == set(expected)
        else:
            assert len(visible(folder)) == save.keep


def test_a_kill_while_the_traces_of_a_kill_are_removed_leaves_one_to_load(tmp_path: Path) -> None:
    before, save = SCENES["the newest again"]
    again = Save(tag=save.tag, content="newer", step=2)
    for folder in kill_everywhere(tmp_path, before, save, every=3):
        for number in range(0, 10_000, 7):
            copy = folder.with_name(f"{folder.name} and {number}")
            shutil.copytree(folder, copy)
            stopped = killed(lambda copy=copy: again.into(copy), number)  # type: ignore[misc]
            assert resolved(copy) in {B.content, save.content, again.content}
            assert resolved(copy / save.tag) in {B.content, save.content, again.content}
            assert visible(copy)[A.tag] == A.content
            shutil.rmtree(copy)
            if not stopped:
                break


def _removed_first(source: Path, target: Path) -> None:
    """A rename that has no old one to fall back on: as if ``publish`` removed it before."""
    if target.name.endswith(".previous"):
        shutil.rmtree(source)
    else:
        source.replace(target)


def _removed_in_place(path: Path, _: str) -> Path:
    shutil.rmtree(path)
    return path


def _made_in_place(folder: Path, tag: str, kind: str, token: str) -> Path:
    return folder / (tag if kind == "partial" else f".{tag}.{token}.{kind}")


MUTATIONS: dict[str, tuple[Any, str, Any, str]] = {
    "the old one is removed before": (leftovers, "rename", _removed_first, "the newest again"),
    "removed under its own name": (leftovers, "doom", _removed_in_place, "and keep one"),
    "written under its own name": (folders, "beside", _made_in_place, "another"),
    "traces of kills are left alone": (
        leftovers,
        "settle_all",
        lambda _: None,
        "the newest again",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_kills_tell_of_a_folder_that_does_without(mutation: str, tmp_path: Path) -> None:
    module, name, mutant, scene = MUTATIONS[mutation]
    with (
        patch.object(module, name, mutant),
        pytest.raises((AssertionError, ValueError, OSError, KeyError)),
    ):
        test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_one(scene, tmp_path)


def logged(work: Callable[[], None]) -> list[str]:
    """Syncs and renames in their order, by the names of files."""
    log: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def log_sync(descriptor: int) -> None:
        log.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> Path:
        log.append(f"rename {source.name} {target.name}")
        return replace(source, target)

    with patch("os.fsync", log_sync), patch.object(Path, "replace", log_rename):
        work()
    return log


def test_the_disk_has_each_step_before_the_next_begins(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    run([A], folder)
    tag = A.tag
    found = [
        TOKEN.sub("SAVE", each) for each in logged(lambda: Save(tag=tag, content="n").into(folder))
    ]
    assert found == [
        f"sync {tmp_path.name}",
        *("sync __0_0.distcp", "sync __1_0.distcp", "sync .metadata"),
        *("sync manifest.json", f"sync .{tag}.SAVE.partial"),
        *(f"rename {tag} .{tag}.SAVE.previous", "sync all"),
        *(f"rename .{tag}.SAVE.partial {tag}", "sync all"),
        *("sync .latest.SAVE.partial", "rename .latest.SAVE.partial latest", "sync all"),
        *(f"rename .{tag}.SAVE.previous .{tag}.SAVE.removed", "sync all"),
    ]


# ---- keep


def test_keep_leaves_the_ones_saved_last_whatever_their_steps(tmp_path: Path) -> None:
    # Gone back to 1 after 3: what 3 belongs to goes first.
    run([B, C, A, Save(tag="step-00000004", content="4", step=4, keep=2)], tmp_path)
    assert set(visible(tmp_path)) == {A.tag, "step-00000004"}
    assert dotted(tmp_path) == []


def test_keep_counts_no_damaged_one_and_touches_nothing_of_others(tmp_path: Path) -> None:
    run([A, B], tmp_path)
    (tmp_path / B.tag / "__0_0.distcp").unlink()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.txt").touch()
    run([Save(tag=C.tag, content="3", step=3, keep=2)], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {A.tag, B.tag, C.tag, "plots", "latest"}


@pytest.mark.parametrize("keep", [0, -1])
def test_to_keep_none_is_refused(keep: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"keep must be 1 or more checkpoints; got {keep}"):
        run([Save(tag=A.tag, content="1", keep=keep)], tmp_path)
    assert not (tmp_path / A.tag).exists()


# ---- begin and publish


@pytest.mark.parametrize(
    "tag", ["", ".", "..", ".x", "a/b", "a\\b", "latest", " a", "a\n", "a\nb", "\x00", "x" * 201]
)
def test_a_tag_that_is_no_plain_name_is_refused(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tag must be a plain name"):
        folders.begin(tmp_path, tag)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    with pytest.raises(ValueError, match="thesis' is not a checkpoint"):
        folders.begin(tmp_path, "thesis")
    assert (tmp_path / "thesis" / "chapter").exists()


def test_a_damaged_checkpoint_is_replaced(tmp_path: Path) -> None:
    run([A, B], tmp_path)
    (tmp_path / B.tag / "manifest.json").unlink()
    run([Save(tag=B.tag, content="new", step=2)], tmp_path)
    assert resolved(tmp_path) == "new"
    assert dotted(tmp_path) == []


def test_an_emptied_checkpoint_is_replaced(tmp_path: Path) -> None:
    """Its load was refused, and so was every later save under its tag: the run could not go on."""
    run([A, B], tmp_path)
    for path in (tmp_path / B.tag).iterdir():
        path.unlink()
    run([Save(tag=B.tag, content="new", step=2)], tmp_path)
    assert resolved(tmp_path) == "new"
    assert dotted(tmp_path) == []


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "all", tmp_path / "elsewhere"
    run([A], folder)
    shutil.move(folder / A.tag, elsewhere)
    (folder / A.tag).symlink_to(elsewhere)
    assert resolved(folder) == A.content
    run([Save(tag=A.tag, content="new", step=1)], folder)
    assert resolved(folder) == "new"
    assert dotted(folder) == []
    assert content_of(elsewhere) == A.content


def test_nothing_is_published_without_a_manifest(tmp_path: Path) -> None:
    run([A], tmp_path)
    partial = folders.begin(tmp_path, A.tag)
    with pytest.raises(ValueError, match=r"manifest.json' is missing"):
        folders.publish(partial, A.tag, None)
    assert resolved(tmp_path) == A.content
