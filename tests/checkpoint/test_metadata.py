# SPDX-License-Identifier: Apache-2.0
"""DCP's ``.metadata``: what DCP writes is read as DCP reads it, and no pickle is ever run."""

from __future__ import annotations

import functools
import os
import pickle
import random
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcps
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flora_dist.checkpoint import metadata
from flora_dist.checkpoint.metadata import read_metadata
from tests.conftest import pool_of


def nested() -> dict[str, Any]:
    """Everything that state dicts hold: dtypes, shapes, nesting, numbers, objects."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8)
    return {
        "tensors": {str(dtype): torch.ones(3, 4).to(dtype) for dtype in dtypes},
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "list": [torch.ones(2), 4, "five", None, 6.0],
        "objects": {"rng": {1, 2}, "path": Path("x")},
    }


def save(folder: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)


def as_dcp_reads_it(folder: Path) -> dcps.Metadata:
    read = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(read, dcps.Metadata)
    # A path in DCP's hands, a string in ours: nothing reads it.
    assert read.storage_meta is not None
    return replace(read, storage_meta=replace(read.storage_meta, checkpoint_id=str(folder)))


def test_what_older_pythons_write_is_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.11.0 to 3.11.3, Debian 12's among them, pickle an enum's member as getattr(class, name).

    No checkpoint could be loaded there.
    """

    def by_name(self: Any, _protocol: int) -> tuple[Any, ...]:
        return getattr, (type(self), self.name)

    monkeypatch.setattr(dcps._MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    save(tmp_path, nested())
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert read_metadata(tmp_path / ".metadata") == as_dcp_reads_it(tmp_path)


def test_any_other_getattr_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_a_member(self: Any, _protocol: int) -> tuple[Any, ...]:
        return getattr, (type(self), "__doc__")

    monkeypatch.setattr(dcps._MEM_FORMAT_ENCODING, "__reduce_ex__", not_a_member)
    save(tmp_path, nested())
    with pytest.raises(ValueError, match="memory_format"):
        read_metadata(tmp_path / ".metadata")


def test_what_dcp_writes_is_read_as_dcp_reads_it(tmp_path: Path) -> None:
    save(tmp_path, nested())
    assert read_metadata(tmp_path / ".metadata") == as_dcp_reads_it(tmp_path)


def save_sharded(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).view(7, 5)
    # Rows that do not divide, columns, and an object.
    state = {"rows": distribute_tensor(whole, mesh, [Shard(0)]), "object": {1}}
    state["columns"] = distribute_tensor(whole, mesh, [Shard(1)])
    dcp.save({"nested": state}, checkpoint_id=folder)


@pytest.mark.ranks(2)
def test_dtensors_of_two_ranks_are_read_as_dcp_reads_them(tmp_path: Path) -> None:
    pool_of(2)(save_sharded, tmp_path)
    read = read_metadata(tmp_path / ".metadata")
    assert read == as_dcp_reads_it(tmp_path)
    columns = read.state_dict_metadata["nested.columns"]
    assert isinstance(columns, dcps.TensorStorageMetadata)
    assert [tuple(chunk.offsets) for chunk in columns.chunks] == [(0, 0), (0, 3)]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_each_protocol_of_pickle_is_read(protocol: int, tmp_path: Path) -> None:
    save(tmp_path, nested())
    expected = as_dcp_reads_it(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(expected, protocol))
    assert read_metadata(tmp_path / ".metadata") == expected


# ---- foreign pickles


MARKER = "marker"
CODE = f"open({MARKER!r}, 'w').close()"


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


class Restored:
    """Whose ``__setstate__`` an ordinary unpickler would run."""

    def __getstate__(self) -> str:
        return MARKER

    def __setstate__(self, marker: str) -> None:
        Path(marker).touch()


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "os.system": (lambda: Calls(os.system, f"touch {MARKER}"), "posix.system"),
    "eval": (lambda: Calls(eval, CODE), "builtins.eval"),
    "exec": (lambda: Calls(exec, CODE), "builtins.exec"),
    "open": (lambda: Calls(open, MARKER, "w"), "io.open"),
    "partial": (lambda: Calls(functools.partial, os.system, "x"), "functools.partial"),
    "a class": (Restored, "test_metadata.Restored"),
    "torch.load": (lambda: Calls(torch.load, MARKER), "torch.serialization.load"),
    "a storage": (lambda: torch.UntypedStorage(3), "torch.storage._load_from_bytes"),
    "a tensor": (lambda: torch.ones(3), "torch._utils._rebuild_tensor_v2"),
    "numpy": (lambda: numpy.ones(3), "numpy"),
}


def refusal(file: Path, content: object) -> str:
    """What is said of a file with these bytes, or with a pickle of this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(ValueError, match="must be what torch's DCP writes") as refused:
        read_metadata(file)
    assert str(file) in str(refused.value)
    return str(refused.value)


def tensor(**changed: Any) -> dcps.TensorStorageMetadata:
    """Of a whole vector of three."""
    chunk = dcps.ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))
    whole = dcps.TensorStorageMetadata(dcps.TensorProperties(), torch.Size([3]), [chunk])
    return replace(whole, **changed)


def place(**changed: Any) -> _StorageInfo:
    return replace(_StorageInfo("__0_0.distcp", 0, 3), **changed)


def whole(**changed: Any) -> dcps.Metadata:
    """Metadata of a vector."""
    index = dcps.MetadataIndex("w", [0])
    made = dcps.Metadata({"w": tensor()}, None, {index: place()}, dcps.StorageMeta("x"), "1.0.0")
    return replace(made, **changed)


@pytest.mark.parametrize("where", ["alone", "deep"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_global_is_named_and_never_called(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build, said = FOREIGN[name]
    content = build() if where == "alone" else whole(planner_data={"w": ("a", build())})
    message = refusal(tmp_path / ".metadata", content)
    assert said in message
    assert "is not one of DCP's" in message
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("where", ["alone", "deep"])
def test_a_chain_of_getattr_is_never_followed(where: str, tmp_path: Path) -> None:
    """getattr is known, as older Pythons write it for an enum's member: a stand-in of that name."""
    chain = Calls(getattr, Calls(getattr, dcps.Metadata, "__init__"), "__globals__")
    content = chain if where == "alone" else whole(planner_data={"w": ("a", chain)})
    assert "getattr" in refusal(tmp_path / ".metadata", content)


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "open", "a class"])
def test_the_planted_pickles_do_run_where_globals_are_not_restricted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else their marker would prove nothing.
    monkeypatch.chdir(tmp_path)
    with patch.object(metadata._Unpickler, "find_class", pickle.Unpickler.find_class):
        refusal(tmp_path / ".metadata", FOREIGN[name][0]())
    assert Path(MARKER).exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


def name_of(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


DCP = "torch.distributed.checkpoint.metadata"
CRAFTED: dict[str, tuple[bytes, str]] = {
    "a name with dots": (opcodes(name_of("torch", "Size.__doc__")), "'torch.Size.__doc__'"),
    "a dtype that is none": (opcodes(name_of("torch", "save")), "'torch.save'"),
    "an old protocol": (b"cos\nsystem\n(S'touch marker'\ntR.", "'os.system'"),
    "INST": (b"(S'touch marker'\nios\nsystem\n.", "'os.system'"),
    "a live object by number": (opcodes(b"\x82\x01"), "opcode EXT1 1"),
    "a memo of gigabytes": (opcodes(b"N", b"r", struct.pack("<I", 2**31 - 1)), "LONG_BINPUT"),
    "an old memo of gigabytes": (b"Np2147483647\n.", "PUT 2147483647"),
    "a persistent id": (opcodes(b"N", b"Q"), "persistent"),
    "a dtype that is called": (opcodes(name_of("torch", "float32"), b")R"), "not callable"),
    "a dtype that is filled": (opcodes(name_of("torch", "float32"), b"}" + text("x") + b"Nsb"), ""),
    "nothing": (b"", ""),
    "text": (b"not a pickle", ""),
    "more after its end": (opcodes(b"N") + b"N", "goes on for 1 bytes after its end"),
    "a class in place of one of its kind": (opcodes(name_of(DCP, "Metadata")), "Metadata must be"),
    "arguments that nothing asks for": (
        opcodes(name_of(DCP, "Metadata"), b"N\x85\x81"),
        "Metadata must be",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_pickle_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = CRAFTED[name]
    assert said in refusal(tmp_path / ".metadata", content)
    assert not Path(MARKER).exists()


def test_a_pickle_cannot_overwrite_what_belongs_to_dcp(tmp_path: Path) -> None:
    # BUILD on a class, with slots: an ordinary restricted unpickler sets attributes of the class.
    attribute = b"}" + text("evil") + b"Ns"
    before = set(vars(dcps.Metadata))
    for state in (attribute, b"N" + attribute + b"\x86"):
        refusal(tmp_path / ".metadata", opcodes(name_of(DCP, "Metadata"), state + b"b"))
    assert set(vars(dcps.Metadata)) == before


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "no metadata": (tensor, "Metadata must be"),
    "a list": (lambda: [whole()], "Metadata must be"),
    "no table of tensors": (lambda: whole(state_dict_metadata=[]), "state_dict_metadata must"),
    "a key that is a number": (lambda: whole(state_dict_metadata={3: tensor()}), "a key must"),
    "a tensor that is a number": (lambda: whole(state_dict_metadata={"w": 3}), "Tensor"),
    "a negative size": (lambda: changed_tensor(size=torch.Size([-3]), chunks=[]), "size must"),
    "a size in words": (lambda: changed_tensor(size="3"), "size must"),
    "a chunk beyond its tensor": (lambda: changed_tensor(size=torch.Size([2])), "a chunk of (2,)"),
    "a chunk of other dims": (lambda: changed_tensor(size=torch.Size([3, 1])), "a chunk of (3, 1)"),
    "chunks in a tuple": (lambda: changed_tensor(chunks=()), "chunks must"),
    "sparse": (lambda: changed_properties(layout=torch.sparse_coo), "layout must"),
    "a dtype in words": (lambda: changed_properties(dtype="float32"), "dtype must"),
    "a flag that is a number": (lambda: changed_properties(requires_grad=3), "requires_grad"),
    "a path that leads out": (lambda: changed_place(relative_path="../x"), "relative_path must"),
    "a path from the root": (lambda: changed_place(relative_path="/etc/passwd"), "relative_path"),
    "an offset before the file": (lambda: changed_place(offset=-1), "offset must"),
    "a transform": (
        lambda: changed_place(transform_descriptors=["zstd"]),
        "fields of _StorageInfo",
    ),
    "a plan with objects": (lambda: whole(planner_data={"w": (torch.Size([]),)}), "planner_data"),
    "modules that are none": (lambda: whole(storage_meta=dcps.StorageMeta(modules=[3])), "modules"),
}


def changed_tensor(**changed: Any) -> dcps.Metadata:
    return whole(state_dict_metadata={"w": tensor(**changed)})


def changed_properties(**changed: Any) -> dcps.Metadata:
    return changed_tensor(properties=dcps.TensorProperties(**changed))


def changed_place(**changed: Any) -> dcps.Metadata:
    return whole(storage_data={dcps.MetadataIndex("w", [0]): place(**changed)})


@pytest.mark.parametrize("name", UNFIT)
def test_values_that_dcp_does_not_write_are_refused(name: str, tmp_path: Path) -> None:
    build, said = UNFIT[name]
    assert said in refusal(tmp_path / ".metadata", build())


def test_a_file_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    with patch.object(metadata, "_LARGEST", 1000):
        assert "more than 1000 bytes" in refusal(tmp_path / ".metadata", b"x" * 1001)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata': .*No such file"):
        read_metadata(tmp_path / ".metadata")


def test_no_byte_changed_or_cut_off_makes_anything_but_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".metadata"
    raw = pickle.dumps(whole())
    drawn = random.Random(0)
    for position in range(len(raw)):
        file.write_bytes(raw[:position])
        with pytest.raises(ValueError, match="metadata"):
            read_metadata(file)
        for _ in range(4):
            changed = bytearray(raw)
            changed[position] = drawn.randrange(256)
            file.write_bytes(changed)
            try:
                found = read_metadata(file)
            except ValueError:
                continue
            assert type(found) is dcps.Metadata
