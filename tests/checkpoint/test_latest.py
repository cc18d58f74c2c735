# SPDX-License-Identifier: Apache-2.0
"""A ``latest`` that people and scripts write is read as meant, or the load is refused."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.convert.command import _places, convert
from tests.checkpoint.kills import Save, content_of, resolved, run

A, B, C = (Save(tag=f"step-0000000{n}", content=f"{n}", step=n) for n in (1, 2, 3))
TWO = B.tag.encode()

MEANT = {
    "as echo writes it": TWO + b"\n",
    "as Windows does": TWO + b"\r\n",
    "as PowerShell 5 does": b"\xff\xfe" + f"{B.tag}\r\n".encode("utf-16-le"),
    "with a byte order mark": b"\xef\xbb\xbf" + TWO,
    "with spaces": b"  " + TWO + b"\t\n",
    "with lines around it": b"\n" + TWO + b"\n\n",
    "in quotes": b'"' + TWO + b'"\n',
    "in single quotes": b"'" + TWO + b"'",
    "with a slash": TWO + b"/\n",
    "from here": b"./" + TWO,
    "by a path from the working folder": b"run/checkpoints/" + TWO + b"\n",
    "by a full path": b"@/" + TWO + b"\n",
    "by a full path with a slash": b"@/" + TWO + b"/\r\n",
    "through the folder above": b"../checkpoints/" + TWO,
}
REFUSED = {
    "a name that is not there": b"step-00000009\n",
    "another digit too many": TWO + b"0",
    "a path to another place": b"/elsewhere/run/checkpoints/" + TWO,
    "a path out of the folder": b"../elsewhere",
    "a folder of its own": b".",
    "the folder above": b"..",
    "half a name": b"la",
    "two names": TWO + b"\n" + A.tag.encode(),
    "a name and a comment": TWO + b"\n# the good one",
    "no text": b"\xff\x00\x9c",
    "a path of Windows": b"run\\checkpoints\\" + TWO,
    "a name inside one": TWO + b"/manifest.json",
    "a number": b"2",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints in run/checkpoints of the working folder."""
    monkeypatch.chdir(tmp_path)
    run([A, B, C], tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("how", MEANT)
def test_a_name_written_by_hand_is_read_as_meant(how: str, folder: Path) -> None:
    """``b"step-00000002\\r\\n"`` loaded step 3, the newest, with a warning."""
    (folder / "latest").write_bytes(MEANT[how].replace(b"@", str(folder).encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folders.resolve(folder) == folder / B.tag
        assert folders.resolve(Path("run/checkpoints")).resolve() == folder / B.tag
    assert [place.name for place in _places(folder)] == ["checkpoints", B.tag]


@pytest.mark.parametrize("what", REFUSED)
def test_what_names_no_checkpoint_of_the_folder_is_refused(what: str, folder: Path) -> None:
    (folder / "latest").write_bytes(REFUSED[what])
    with pytest.raises(ValueError, match=r"latest'.*by its own path"):
        folders.resolve(folder)
    assert folders.has_checkpoint(folder)
    assert resolved(folder / B.tag) == B.content


def test_the_name_of_what_was_removed_is_as_a_missing_latest(folder: Path) -> None:
    """A save wrote it, and whoever removed its checkpoint knows: the newest of the others."""
    shutil.rmtree(folder / C.tag)
    with pytest.warns(UserWarning, match="taking the newest whole one"):
        assert folders.resolve(folder) == folder / B.tag


def test_the_name_of_what_was_renamed_is_refused_with_its_new_name(folder: Path) -> None:
    (folder / C.tag).rename(folder / "best")
    with pytest.raises(ValueError, match="not there, with the sha256 of 'best'"):
        folders.resolve(folder)


def test_a_link_for_latest_is_followed_and_replaced_by_the_next_save(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(B.tag)
    assert resolved(folder) == B.content
    run([A], folder)
    assert resolved(folder) == A.content
    assert content_of(folder / B.tag) == B.content


def test_a_copy_for_latest_is_loaded_and_stays(folder: Path) -> None:
    (folder / "latest").unlink()
    shutil.copytree(folder / B.tag, folder / "latest")
    assert resolved(folder) == B.content
    with pytest.raises(ValueError, match="latest' is a folder"):
        run([A], folder)
    assert resolved(folder) == B.content


# ---- links that lead nowhere


def test_a_latest_that_leads_nowhere_is_refused_by_what_it_led_to(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("/mnt/gone/step-00000002")
    with pytest.raises(ValueError, match="is a link to '/mnt/gone/step-00000002', which is not"):
        folders.resolve(folder)
    assert folders.has_checkpoint(folder)


def test_a_checkpoint_that_leads_nowhere_is_named_with_what_it_led_to(folder: Path) -> None:
    shutil.rmtree(folder / B.tag)
    (folder / B.tag).symlink_to("/mnt/gone")
    with pytest.raises(ValueError, match="step-00000002' is a link to '/mnt/gone', which is not"):
        folders.resolve(folder / B.tag)
    with pytest.raises(ValueError, match="step-00000002' is a link to '/mnt/gone', which is not"):
        folders.begin(folder, B.tag)
    (folder / "latest").write_text(B.tag)
    with pytest.raises(ValueError, match="says 'step-00000002', which is a link to"):
        folders.resolve(folder)
    assert (folder / B.tag).is_symlink()


def test_a_folder_that_leads_nowhere_does_not_count_as_an_empty_one(tmp_path: Path) -> None:
    """The disk that it leads to was not mounted: the run would have begun anew."""
    (tmp_path / "all").symlink_to("/mnt/gone")
    for call in (folders.has_checkpoint, folders.resolve, convert):
        with pytest.raises(ValueError, match="all' is a link to '/mnt/gone', which is not there"):
            call(tmp_path / "all", *[tmp_path / "file.pt"] * (call is convert))
    with pytest.raises(ValueError, match="all' is a link to '/mnt/gone', which is not there"):
        folders.begin(tmp_path / "all", A.tag)


# ---- files that must not be opened, or not be read whole


def test_a_latest_that_is_no_small_file_is_refused_at_once(folder: Path) -> None:
    """One of 8 GB filled memory; a FIFO waited for ever."""
    latest = folder / "latest"
    with latest.open("wb") as stream:
        stream.truncate(8 << 30)  # a hole: no disk is used
    with pytest.raises(ValueError, match="has 8589934592 bytes"):
        folders.resolve(folder)
    latest.unlink()
    os.mkfifo(latest)
    with pytest.raises(ValueError, match="is not a regular file"):
        folders.resolve(folder)
