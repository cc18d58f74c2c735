# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a folder is the latest, on files that saves made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flora_dist.checkpoint import folder as folders
from tests.checkpoint.kills import Save, resolved, run
from tests.checkpoint.test_folder import A, B, C


def test_latest_names_the_one_saved_last_whatever_its_step(tmp_path: Path) -> None:
    run([A, B, C, A], tmp_path)
    assert (tmp_path / "latest").read_text(encoding="utf-8").split("\n")[0] == A.tag
    assert folders.resolve(tmp_path) == tmp_path / A.tag
    assert folders.resolve(tmp_path / B.tag) == tmp_path / B.tag


def test_without_latest_the_one_saved_last_is_taken_with_a_warning(tmp_path: Path) -> None:
    run([B, C, A], tmp_path)
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match=r"latest' names no checkpoint that is there; taking .*1'"):
        assert folders.resolve(tmp_path) == tmp_path / A.tag


@pytest.mark.parametrize("said", ["", "\n", " \r\n"])
def test_an_empty_latest_is_as_a_missing_one(said: str, tmp_path: Path) -> None:
    run([A, B], tmp_path)
    (tmp_path / "latest").write_text(said, encoding="latin-1")
    with pytest.warns(UserWarning, match="taking the newest whole one"):
        assert folders.resolve(tmp_path) == tmp_path / B.tag


def test_the_newest_whole_one_has_all_its_files(tmp_path: Path) -> None:
    run([A, B, C], tmp_path)
    shutil.rmtree(tmp_path / C.tag)
    (tmp_path / B.tag / "__0_0.distcp").unlink()
    with pytest.warns(UserWarning, match="taking the newest whole one"):
        assert folders.resolve(tmp_path) == tmp_path / A.tag


def test_a_name_written_by_hand_counts(tmp_path: Path) -> None:
    run([A, B], tmp_path)
    (tmp_path / "latest").write_text(f"{A.tag}\n", encoding="utf-8")
    assert folders.resolve(tmp_path) == tmp_path / A.tag


def test_a_bit_flipped_in_latest_leads_to_no_other_checkpoint(tmp_path: Path) -> None:
    # 1 and 3 are one bit apart.
    run([A, C], tmp_path)
    raw = (tmp_path / "latest").read_bytes()
    for position in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        (tmp_path / "latest").write_bytes(flipped)
        try:
            assert resolved(tmp_path) == C.content
        except ValueError as error:
            assert "latest" in str(error)  # noqa: PT017 - either is right


def test_a_checkpoint_swapped_for_another_runs_is_not_the_one_latest_names(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run([A, B], ours)
    run([A, Save(tag=B.tag, content="foreign", step=2)], theirs)
    shutil.rmtree(ours / B.tag)
    shutil.move(theirs / B.tag, ours / B.tag)
    with pytest.raises(ValueError, match=r"latest' has '[0-9a-f]{64}', '.*manifest.json' is"):
        folders.resolve(ours)
    assert resolved(ours / A.tag) == A.content


def test_a_damaged_newest_one_is_an_error_and_the_previous_one_loads(tmp_path: Path) -> None:
    run([A, B], tmp_path)
    (tmp_path / B.tag / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000002/manifest.json' is missing"):
        folders.resolve(tmp_path)
    with pytest.raises(ValueError, match=r"step-00000002/manifest.json' is missing"):
        folders.resolve(tmp_path / B.tag)
    assert resolved(tmp_path / A.tag) == A.content


@pytest.mark.parametrize("kind", ["absent", "empty", "a file", "foreign"])
def test_what_is_no_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    if kind == "a file":
        path.touch()
    elif kind != "absent":
        path.mkdir()
    if kind == "foreign":
        (path / "plots").mkdir()
    assert not folders.has_checkpoint(path)
    with pytest.raises(ValueError, match="it"):
        folders.resolve(path)


def test_a_folder_where_only_a_partial_one_is_left_has_no_checkpoint(tmp_path: Path) -> None:
    folders.begin(tmp_path, A.tag)
    assert not folders.has_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint that is there, and no other is whole"):
        folders.resolve(tmp_path)


def test_a_damaged_checkpoint_is_not_none(tmp_path: Path) -> None:
    # Else a run whose only checkpoint is torn would quietly start anew.
    run([A], tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / A.tag / "manifest.json").unlink()
    assert folders.has_checkpoint(tmp_path)
