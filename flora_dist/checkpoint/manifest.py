# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's manifest: its files by size and sha256, its tensors, and every number beside them.

``manifest.json`` opens with the sha256 of all its own bytes after that digest, so that no flipped
bit of it goes unnoticed; ``tail -c +77 manifest.json | sha256sum`` computes it:

    {"sha256": "<64 hex digits>",
     "version": 1, "serial": 3, "step": 10, "files": {...}, "tensors": {...}, ...}

``serial`` counts the checkpoints of a folder in the order of writing: steps go back after a resume
from an older one, clocks and file times after a copy. Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from flora_dist.checkpoint.files import open_plain, read_plain

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""What stands in a manifest; floats come back bit for bit, infinities too."""
VERSION = 1
"""Of the manifest's fields and meanings; readers refuse newer ones."""
NAME = "manifest.json"
"""The manifest's file in a checkpoint."""

_OPENING = b'{"sha256": "'
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("sha256", "version", "serial", "step", "files", "tensors")
_LARGEST = 1 << 28
_GREATEST = (1 << 63) - 1
"""Of whole numbers: what torch's sizes and the bits of a key take."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """One file, as it was written."""

    bytes: int
    """Its size."""
    sha256: str
    """Of its bytes, in hex digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """One tensor, all ranks together."""

    shape: tuple[int, ...]
    """In the canonical form."""
    dtype: str
    """As torch spells it: "float32"."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    """Steps done when it was written."""
    files: dict[str, FileFacts]
    """All but the manifest, by plain name."""
    tensors: dict[str, TensorFacts]
    """By key."""
    facts: dict[str, Json]
    """All else, as its writer gave it: fields of their own beside these."""


def write_manifest(partial: Path, manifest: Manifest) -> None:
    """Write a checkpoint's last file, and see that disk and folder have it.

    Raises:
        ValueError: a file's name with a path in it, or a value that JSON would change.
    """
    taken = sorted(set(_FIELDS) & set(manifest.facts))
    assert not taken, f"fields of the manifest itself: {taken}"
    for name in manifest.files:
        check_file_name(name, partial)
    _check_json(manifest.facts, "manifest")
    document = {
        "version": VERSION,
        "serial": 1 + max(map(serial_of, partial.parent.glob(f"*/{NAME}")), default=0),
        "step": manifest.step,
        "files": {name: asdict(facts) for name, facts in manifest.files.items()},
        "tensors": {key: asdict(facts) for key, facts in manifest.tensors.items()},
        **manifest.facts,
    }
    rest = b'",\n' + json.dumps(document, indent=1).encode()[1:] + b"\n"
    write_durably(partial / NAME, _OPENING + _sha256(rest) + rest)
    sync_folder(partial)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, every field checked.

    Raises:
        ValueError: it is missing, damaged, of a newer version, or not one of ours; names the field.
    """
    file = path / NAME
    document = _document(file)
    version = _count(document.pop("version", None), file, "version")
    if version != VERSION:
        raise _wrong(file, f"'version' is {version}, this flora_dist reads {VERSION}", "Upgrade it")
    _count(document.pop("serial", None), file, "serial")
    step = _count(document.pop("step", None), file, "step")
    files = {
        name: _file_facts(facts, file, f"files.{name}")
        for name, facts in _table(document.pop("files", None), file, "files").items()
    }
    for name in files:
        check_file_name(name, file)
    tensors = {
        key: _tensor_facts(facts, file, f"tensors.{key}")
        for key, facts in _table(document.pop("tensors", None), file, "tensors").items()
    }
    return Manifest(step=step, files=files, tensors=tensors, facts=document)


def serial_of(file: Path) -> int:
    """When a manifest was written, counted in manifests; 0 if it cannot be read."""
    try:
        return _count(_document(file).get("serial"), file, "serial")
    except ValueError:
        return 0


def hash_files(path: Path, names: Iterable[str]) -> dict[str, FileFacts]:
    """Size and sha256 of files just written, after the disk has them.

    Raises:
        ValueError: a name with a path in it.
        OSError: the file system.
    """
    found: dict[str, FileFacts] = {}
    for name in names:
        check_file_name(name, path)
        with open_plain(path / name) as file:
            os.fsync(file.fileno())
        found[name] = _facts_of(path / name)
    return found


def wrong_size(path: Path, manifest: Manifest, *, share: tuple[int, int]) -> str | None:
    """The first of every world-th file that is not there with the bytes that its manifest says."""
    rank, world = share
    for name in sorted(manifest.files)[rank::world]:
        size, listed = size_of(path / name), manifest.files[name].bytes
        if size != listed:
            is_now = "is missing" if size is None else f"has {size} bytes"
            return _changed(path / name, f"{is_now}, {NAME} says {listed} bytes")
    return None


def verify_files(path: Path, manifest: Manifest, *, share: tuple[int, int]) -> str | None:
    """Compare every world-th file with the manifest; the first error, None if all is well.

    Sizes come first: they cost nothing. Files that the manifest does not list are ignored.

    Args:
        path: the checkpoint.
        manifest: its own.
        share: this rank, and the world size over which the files are shared out.
    """
    if error := wrong_size(path, manifest, share=share):
        return error
    rank, world = share
    for name in sorted(manifest.files)[rank::world]:
        facts = manifest.files[name]
        try:
            found = _facts_of(path / name)
        except OSError as failed:
            return _changed(path / name, f"cannot be read: {failed}")
        if found != facts:
            return _changed(path / name, f"has sha256 {found.sha256}, {NAME} says {facts.sha256}")
    return None


def size_of(file: Path) -> int | None:
    """Bytes of a regular file, None if there is none."""
    return file.stat().st_size if file.is_file() else None


def digest_of(path: Path) -> str | None:
    """The sha256 of a checkpoint's whole manifest, None if it has none that can be read."""
    try:
        return hashlib.sha256(read_plain(path / NAME, _LARGEST)).hexdigest()
    except OSError:
        return None


def check_file_name(name: str, where: Path) -> None:
    """Refuse a name that leads out of its checkpoint.

    Raises:
        ValueError: separators, "..", control characters, or the manifest's own name.
    """
    plain = name not in ("", ".", "..", NAME) and name.isprintable()
    if not plain or "/" in name or "\\" in name:
        raise _wrong(where, f"'files' has {name!r}, which is not a plain file name")


def write_durably(file: Path, content: bytes) -> None:
    """Write a file, and wait for the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names: its files' own syncs do not cover them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # CIFS and some FUSE: folders have no sync of their own
            raise
    finally:
        os.close(descriptor)


def _document(file: Path) -> dict[str, Json]:
    """The fields of a manifest, once its own digest fits."""
    try:
        size = size_of(file)
        if size is None or size > _LARGEST:
            raise _wrong(file, "is missing" if size is None else f"has {size} bytes")
        raw = read_plain(file, _LARGEST)
    except OSError as error:
        raise _wrong(file, f"cannot be read: {error}") from error
    stop = len(_OPENING) + 64
    if not raw.startswith(_OPENING):
        raise _wrong(
            file,
            "does not begin with the field 'sha256': it was not written by "
            "flora_dist, or is damaged",
        )
    if raw[len(_OPENING) : stop] != _sha256(raw[stop:]):
        raise _wrong(
            file, "does not have the 'sha256' that it names: it was damaged, or changed by hand"
        )
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _wrong(file, f"is not JSON: {error}") from error
    fields = _table(document, file, "manifest")
    del fields["sha256"]
    return fields


def _file_facts(value: Json, file: Path, field: str) -> FileFacts:
    facts = _table(value, file, field)
    digest = facts.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise _wrong(file, f"'{field}.sha256' is {digest!r}, not 64 hex digits")
    return FileFacts(bytes=_count(facts.get("bytes"), file, f"{field}.bytes"), sha256=digest)


def _tensor_facts(value: Json, file: Path, field: str) -> TensorFacts:
    facts = _table(value, file, field)
    shape, dtype = facts.get("shape"), facts.get("dtype")
    if not isinstance(shape, list):
        raise _wrong(file, f"'{field}.shape' is {shape!r}, not a list of sizes")
    if not isinstance(dtype, str):
        raise _wrong(file, f"'{field}.dtype' is {dtype!r}, not a name")
    sizes = tuple(_count(size, file, f"{field}.shape") for size in shape)
    return TensorFacts(shape=sizes, dtype=dtype)


def _count(value: Json, file: Path, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _GREATEST:
        raise _wrong(file, f"'{field}' is {value!r}, not a whole number from 0 to 2^63 - 1")
    return value


def _table(value: Json, file: Path, field: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise _wrong(file, f"'{field}' is {type(value).__name__}, not a table")
    return value


def _check_json(value: object, place: str) -> None:
    """Refuse what JSON cannot hold, and what it would give back as something else."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _unwritable(f"the key {key!r} of {place}", key)
            _check_json(item, f"{place}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{place}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise _unwritable(place, value)


def _unwritable(place: str, value: object) -> ValueError:
    return ValueError(
        "what a checkpoint keeps beside tensors must be None, booleans, numbers, strings, lists, "
        f"and tables keyed by strings; {place} is a {type(value).__name__}. Convert it first."
    )


def _facts_of(file: Path) -> FileFacts:
    digest, size = hashlib.sha256(), 0
    with open_plain(file) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileFacts(bytes=size, sha256=digest.hexdigest())


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _changed(file: Path, what: str) -> str:
    return (
        f"a checkpoint's files must be as they were written; '{file}' {what}. "
        "Load another checkpoint."
    )


def _wrong(file: Path, what: str, remedy: str = "Load another checkpoint") -> ValueError:
    return ValueError(
        "a checkpoint's manifest must be complete and written by flora_dist; "
        f"'{file}' {what}. {remedy}."
    )
