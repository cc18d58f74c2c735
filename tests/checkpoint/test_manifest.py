# SPDX-License-Identifier: Apache-2.0
"""Manifests: what comes back, what is noticed, what is refused; and the files they list."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flora_dist.checkpoint import manifest as manifests
from flora_dist.checkpoint.manifest import (
    FileFacts,
    Manifest,
    TensorFacts,
    hash_files,
    read_manifest,
    verify_files,
    write_manifest,
)

NUMBERS = [0.1, 1e-310, 2.0**53 + 2, -0.0, math.pi, math.inf, -math.inf, 2**70, 0, -1]
FACTS: dict[str, Any] = {
    "parameters": {"w": {"step": 3, "shape": [4, 5]}},
    "groups": [{"names": ["w"], "settings": {"lr": 3e-4, "rank": None, "sketch": "normal"}}],
    "extra": {
        "numbers": NUMBERS,
        "words": ["\u00e4\u2028", "\ud800", '"'],
        "none": None,
        "no": False,
    },
}
TENSORS = {
    "model.w": TensorFacts(shape=(4, 5), dtype="float32"),
    "b": TensorFacts(shape=(), dtype="x"),
}


def made(folder: Path) -> Manifest:
    """A checkpoint of three files; its manifest."""
    for number in range(3):
        (folder / f"f{number}").write_bytes(os.urandom(100 + number))
    files = hash_files(folder, ["f0", "f1", "f2"])
    manifest = Manifest(step=7, files=files, tensors=TENSORS, facts=FACTS)
    write_manifest(folder, manifest)
    return manifest


def forge(folder: Path, **fields: Any) -> None:
    """Change fields of a manifest, and its digest with them; ``...`` removes one."""
    file = folder / "manifest.json"
    document = {**json.loads(file.read_bytes()), **fields}
    document = {k: v for k, v in document.items() if v is not ... and k != "sha256"}
    rest = b'",' + json.dumps(document).encode()[1:]
    digest = hashlib.sha256(rest).hexdigest().encode()
    file.write_bytes(b'{"sha256": "' + digest + rest)


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    read = read_manifest(tmp_path)
    assert read == manifest
    numbers = read.facts["extra"]["numbers"]  # type: ignore[call-overload, index]
    assert [(type(n), repr(n)) for n in numbers] == [(type(n), repr(n)) for n in NUMBERS]
    assert repr(read.facts) == repr(manifest.facts)


def test_a_nan_comes_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(step=0, files={}, tensors={}, facts={"lr": math.nan}))
    (found,) = read_manifest(tmp_path).facts.values()
    assert isinstance(found, float)
    assert math.isnan(found)


def test_each_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    made(tmp_path)
    file = tmp_path / "manifest.json"
    raw = file.read_bytes()
    for position in range(0, 8 * len(raw), 3):  # 3 and 8 have no common factor: every bit of a byte
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"manifest.json"):
            read_manifest(tmp_path)


def test_each_cut_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    made(tmp_path)
    file = tmp_path / "manifest.json"
    raw = file.read_bytes()
    for length in range(len(raw)):
        file.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"manifest.json"):
            read_manifest(tmp_path)


def test_the_digest_is_what_the_shell_computes(tmp_path: Path) -> None:
    made(tmp_path)
    file = tmp_path / "manifest.json"
    command = f"tail -c +77 {file} | sha256sum"
    said = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == json.loads(file.read_bytes())["sha256"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a newer version": ({"version": 2}, "'version' is 2, this flora_dist reads 1. Upgrade it"),
    "no version": ({"version": ...}, "'version' is None"),
    "a version in words": ({"version": "1"}, "'version' is '1'"),
    "no step": ({"step": ...}, "'step' is None"),
    "a step before 0": ({"step": -1}, "'step' is -1"),
    "a step that is true": ({"step": True}, "'step' is True"),
    "a step between": ({"step": 1.0}, "'step' is 1.0"),
    "no serial": ({"serial": ...}, "'serial' is None"),
    "no files": ({"files": ...}, "'files' is NoneType"),
    "files in a list": ({"files": []}, "'files' is list"),
    "a file that is a size": ({"files": {"f0": 3}}, "'files.f0' is int"),
    "a file of no size": ({"files": {"f0": {"sha256": "0" * 64}}}, "'files.f0.bytes' is None"),
    "half a hash": ({"files": {"f0": {"bytes": 1, "sha256": "ab"}}}, "'files.f0.sha256' is 'ab'"),
    "no tensors": ({"tensors": ...}, "'tensors' is NoneType"),
    "a tensor of no shape": ({"tensors": {"w": {"dtype": "x"}}}, "'tensors.w.shape' is None"),
    "a shape in words": ({"tensors": {"w": {"dtype": "x", "shape": ["4"]}}}, "'tensors.w.shape'"),
    "a tensor of no dtype": ({"tensors": {"w": {"shape": []}}}, "'tensors.w.dtype' is None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_with_a_digest_of_its_own_is_refused_by_its_fields(
    name: str, tmp_path: Path
) -> None:
    made(tmp_path)
    forge(tmp_path)
    read_manifest(tmp_path)
    fields, said = REFUSED[name]
    forge(tmp_path, **fields)
    with pytest.raises(ValueError, match=r"manifest.json") as refused:
        read_manifest(tmp_path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "name", ["../f0", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "manifest.json", "a\x00", "a\n"]
)
def test_a_file_that_leads_out_of_its_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    manifest = made(tmp_path)
    facts = FileFacts(bytes=1, sha256="0" * 64)
    forge(tmp_path, files={name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match="not a plain file name"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="not a plain file name"):
        write_manifest(tmp_path, replace(manifest, files={name: facts}))
    with pytest.raises(ValueError, match="not a plain file name"):
        hash_files(tmp_path, [name])


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"step": 3}', b"\x80\x04."])
def test_a_foreign_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match="does not begin with the field 'sha256'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("rest", [b'", 3', b'", "a": ' + b"[" * 100_000, b'"}}'])
def test_what_is_no_json_is_refused_though_its_digest_fits(rest: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(rest).hexdigest().encode()
    (tmp_path / "manifest.json").write_bytes(b'{"sha256": "' + digest + rest)
    with pytest.raises(ValueError, match=r"manifest.json' is not JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "a folder", "huge"])
def test_a_manifest_that_is_no_small_file_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    if kind == "a folder":
        file.mkdir()
    elif kind == "huge":
        with file.open("wb") as stream:
            stream.truncate((1 << 28) + 1)  # a hole: no disk is used
    with pytest.raises(ValueError, match=r"manifest.json' (is missing|has \d+ bytes)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((1, 2), r"manifest.extra.a is a tuple"),
        ({1: 2}, r"the key 1 of manifest.extra.a is a int"),
        ([b"x"], r"manifest.extra.a\[0\] is a bytes"),
        ({"b": {3}}, r"manifest.extra.a.b is a set"),
        (Path("x"), r"manifest.extra.a is a PosixPath"),
    ],
)
def test_what_json_would_change_is_refused(value: Any, said: str, tmp_path: Path) -> None:
    manifest = Manifest(step=1, files={}, tensors={}, facts={"extra": {"a": value}})
    with pytest.raises(ValueError, match=said):
        write_manifest(tmp_path, manifest)
    assert list(tmp_path.iterdir()) == []


# ---- the files


DAMAGES: dict[str, Any] = {
    "is missing": lambda file: file.unlink(),
    "has 101 bytes": lambda file: file.write_bytes(b"x" * 101),
    "has 0 bytes": lambda file: file.write_bytes(b""),
    "has sha256": lambda file: file.write_bytes(b"x" * 102),
    "is missing, manifest": lambda file: (file.unlink(), file.mkdir()),
    "missing": lambda file: (file.unlink(), os.mkfifo(file)),  # to open it would wait for ever
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_changed_file_is_named_by_the_rank_whose_share_it_is(said: str, tmp_path: Path) -> None:
    manifest = made(tmp_path)
    assert verify_files(tmp_path, manifest, share=(0, 1)) is None
    DAMAGES[said](tmp_path / "f2")
    found = [verify_files(tmp_path, manifest, share=(rank, 2)) for rank in range(2)]
    assert found[1] is None
    assert found[0] is not None
    assert "f2' " in found[0]
    assert said in found[0]


def test_shares_cover_all_files_once(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    for world in (1, 2, 3, 5):
        for name in manifest.files:
            damaged = replace(
                manifest, files={**manifest.files, name: FileFacts(bytes=0, sha256="")}
            )
            found = [verify_files(tmp_path, damaged, share=(r, world)) for r in range(world)]
            assert sum(error is not None for error in found) == 1


def test_files_that_no_manifest_lists_are_ignored(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert verify_files(tmp_path, manifest, share=(0, 1)) is None


def test_a_flip_in_any_file_is_noticed_and_only_by_hashing(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    raw = bytearray((tmp_path / "f1").read_bytes())
    raw[50] ^= 4
    (tmp_path / "f1").write_bytes(raw)
    assert "f1' has sha256" in (verify_files(tmp_path, manifest, share=(0, 1)) or "")
    with patch.object(manifests, "_facts_of", lambda file: manifest.files[file.name]):
        assert verify_files(tmp_path, manifest, share=(0, 1)) is None
