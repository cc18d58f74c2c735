# SPDX-License-Identifier: Apache-2.0
"""``keep`` and the next save touch nothing but what saves made, under the names that they gave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flora_dist import checkpoint
from flora_dist.checkpoint import folder as folders
from tests.checkpoint.kills import Save, content_of, run
from tests.checkpoint.test_manifest import forge
from tests.checkpoint.two import trained

A, B, C, D = (Save(tag=f"step-0000000{n}", content=f"{n}", step=n) for n in (1, 2, 3, 4))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "latest"}


def _copied(folder: Path) -> str:
    shutil.copytree(folder / A.tag, folder / "backup-of-1")
    return "backup-of-1"


def _renamed(folder: Path) -> str:
    shutil.copytree(folder / A.tag, folder / "step-00000009")
    return "step-00000009"


def _linked(folder: Path) -> str:
    (folder / "best").symlink_to(A.tag)
    return "best"


def _moved_away(folder: Path) -> str:
    shutil.move(folder / A.tag, folder.parent / "large-disk")
    (folder / A.tag).symlink_to(folder.parent / "large-disk")
    return A.tag


KEPT: dict[str, Callable[[Path], str]] = {
    "a copy": _copied,
    "a copy with a step's name": _renamed,
    "a link to one": _linked,
    "one that was moved to another disk": _moved_away,
}


@pytest.mark.parametrize("what", KEPT)
def test_what_a_person_keeps_beside_the_checkpoints_stays(what: str, tmp_path: Path) -> None:
    """``cp -r step-2 backup-of-2``, then a save with keep=2: the backup was gone."""
    folder = tmp_path / "all"
    run([A, B], folder)
    name = KEPT[what](folder)
    for save in (C, D):
        run([Save(tag=save.tag, content=save.content, step=save.step, keep=1)], folder)
    assert content_of(folder / name) == A.content
    assert names(folder) - {name, A.tag} == {D.tag}


def test_copies_of_real_checkpoints_stay_and_custom_tags_rotate(tmp_path: Path) -> None:
    """The manifest says under which name a save made it: any tag counts, and only there."""
    model, optimizer = trained()
    for number in range(3):
        checkpoint.save(tmp_path, model, optimizer, step=1, tag=f"epoch-{number}", keep=1)
        if number == 0:
            shutil.copytree(tmp_path / "epoch-0", tmp_path / "step-00000001")
    assert names(tmp_path) == {"epoch-2", "step-00000001"}
    manifest = json.loads((tmp_path / "epoch-2" / "manifest.json").read_bytes())
    assert manifest["tag"] == "epoch-2"


def test_of_earlier_versions_checkpoints_only_names_by_steps_rotate(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step, tag in ((1, None), (2, "mine")):
        path = checkpoint.save(tmp_path, model, optimizer, step=step, tag=tag)
        forge(path, tag=...)
    (tmp_path / "latest").write_text("mine")
    checkpoint.save(tmp_path, model, optimizer, step=3, keep=1)
    assert names(tmp_path) == {"mine", "step-00000003"}


@pytest.mark.parametrize("name", ["..previous", ".previous", "..removed", "..partial", ".x y."])
def test_a_checkpoint_in_a_dotted_folder_of_somebodys_own_stays(name: str, tmp_path: Path) -> None:
    """In a folder ``..previous`` one made the next save remove the folder of all checkpoints."""
    folder = tmp_path / "all"
    run([A], folder)
    shutil.copytree(folder / A.tag, folder / name)
    run([B, Save(tag=C.tag, content="3", step=3, keep=1)], folder)
    assert names(folder) == {C.tag, name}
    assert content_of(folder / name) == A.content
    assert folders.resolve(folder) == folder / C.tag
