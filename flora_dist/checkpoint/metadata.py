# SPDX-License-Identifier: Apache-2.0
"""Reads DCP's ``.metadata``, which is a pickle, without running any of it.

The unpickler gives out stand-ins, made anew for each file, in place of DCP's classes: a pickle can
call them, fill them and overwrite their attributes, and all of that stays in the stand-ins. What it
left is then checked value by value and put together as DCP's own. dtypes alone are torch's: they
cannot be called or changed. Format of torch 2.11 to 2.13.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from flora_dist.checkpoint.files import read_plain

_DCP = "torch.distributed.checkpoint.metadata"
_PATHS = tuple((m, f"{k}Path") for m in ("pathlib", "pathlib._local") for k in ("Posix", "Windows"))
_GLOBALS = {
    *((_DCP, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_DCP, f"{kind}StorageMetadata") for kind in ("Tensor", "Chunk", "Bytes")),
    (_DCP, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    # How Python 3.11.0 to 3.11.3 (Debian 12's) pickle an enum's member: getattr(class, name).
    ("builtins", "getattr"),
    *_PATHS,
}
_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_MEMORY_NAMES = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
_LARGEST = 1 << 28


def read_metadata(path: Path) -> Metadata:
    """What DCP has stored, and in which bytes of which files.

    Raises:
        ValueError: a global that DCP's metadata is not made of, or anything else that is not DCP's;
            names the file.
    """
    try:
        return _metadata(_unpickled(path))
    # Of a foreign pickle: any error at all (UnpicklingError, EOFError, TypeError, MemoryError).
    except Exception as error:
        raise ValueError(
            f"a checkpoint's metadata must be what torch's DCP writes; '{path}': {error}. "
            "Load another checkpoint."
        ) from error


class _StandIn:
    """What a pickle has made of one of DCP's classes: arguments and state, nothing run."""

    kind: tuple[str, str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _StandIn:
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _GLOBALS:
            # A class of its own each time: BUILD sets attributes of classes too.
            return type(name, (_StandIn,), {"kind": (module, name)})
        raise ValueError(f"the global '{module}.{name}' is not one of DCP's")


def _unpickled(path: Path) -> Any:
    raw = read_plain(path, _LARGEST)
    stop = 0
    for opcode, value, position in pickletools.genops(raw):
        # EXT codes come from a cache of live objects, past find_class. The C unpickler makes its
        # memo as long as the greatest index: a few bytes would take all memory.
        if opcode.name.startswith("EXT") or ("PUT" in opcode.name and int(value or 0) > len(raw)):
            raise ValueError(f"opcode {opcode.name} {value} is not one that DCP writes")
        stop = position or 0
    if stop + 1 != len(raw):
        raise ValueError(f"it goes on for {len(raw) - stop - 1} bytes after its end")
    return _Unpickler(io.BytesIO(raw)).load()


# ---- put together again


def _metadata(value: Any) -> Metadata:
    fields = _fields(value, "Metadata")
    tensors = _table(fields.pop("state_dict_metadata", None), "state_dict_metadata")
    places = _table(fields.pop("storage_data", None), "storage_data")
    plan = fields.pop("planner_data", None)
    origin = fields.pop("storage_meta", None)
    version = fields.pop("version", None)
    _need(not fields, "fields of Metadata", sorted(fields))
    _need(version is None or isinstance(version, str), "version", version)
    metadata = Metadata(
        state_dict_metadata={_text(key, "a key"): _stored(v) for key, v in tensors.items()},
        planner_data=None if plan is None else _plan(plan),
        storage_data={_index(key): _place(place) for key, place in places.items()},
        storage_meta=None if origin is None else _origin(origin),
        version=version,
    )
    _need(len(metadata.storage_data) == len(places), "storage_data", "two places for one chunk")
    return metadata


def _stored(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _is(value, "BytesStorageMetadata"):
        _need(not value.state, "BytesStorageMetadata", value.state)
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata", "properties", "size", "chunks")
    size, chunks = _size(fields["size"], "size"), fields["chunks"]
    _need(isinstance(chunks, list), "chunks", chunks)
    return TensorStorageMetadata(
        properties=_properties(fields["properties"]),
        size=size,
        chunks=[_chunk(chunk, size) for chunk in chunks],
    )


def _chunk(value: Any, whole: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata", "offsets", "sizes")
    offsets, sizes = _size(fields["offsets"], "offsets"), _size(fields["sizes"], "sizes")
    inside = len(offsets) == len(sizes) == len(whole) and all(
        start + length <= size for start, length, size in zip(offsets, sizes, whole, strict=True)
    )
    _need(inside, f"a chunk of {tuple(whole)}", (tuple(offsets), tuple(sizes)))
    return ChunkStorageMetadata(offsets=offsets, sizes=sizes)


def _properties(value: Any) -> TensorProperties:
    _need(_is(value, "TensorProperties"), "properties", value)
    _need(isinstance(value.state, tuple) and len(value.state) == 5, "properties", value.state)
    dtype, layout, requires_grad, encoding, pin_memory = value.state
    _need(isinstance(dtype, torch.dtype), "dtype", dtype)
    is_strided = _is(layout, "_get_layout") and layout.args == ("torch.strided",)
    _need(is_strided, "layout", layout)
    flags = isinstance(requires_grad, bool) and isinstance(pin_memory, bool)
    _need(flags, "requires_grad and pin_memory", (requires_grad, pin_memory))
    return TensorProperties(
        dtype=dtype,
        requires_grad=requires_grad,
        memory_format=_MEMORY_FORMATS[_memory_format(encoding)],
        pin_memory=pin_memory,
    )


def _memory_format(value: Any) -> int:
    """Which of DCP's enum: by value, or by name as Python 3.11.0 to 3.11.3 write it."""
    if _is(value, "getattr") and len(value.args) == 2:
        kind, name = value.args
        of_enum = getattr(kind, "kind", None) == (_DCP, "_MEM_FORMAT_ENCODING")
        if of_enum and name in _MEMORY_NAMES:
            return _MEMORY_NAMES.index(name)
    known = _is(value, "_MEM_FORMAT_ENCODING") and value.args in [(0,), (1,), (2,)]
    _need(known, "memory_format", value)
    return int(value.args[0])


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, index = fields.pop("offset", None), fields.pop("index", None)
    name = _text(fields.pop("fqn", None), "fqn")
    _need(not fields, "fields of MetadataIndex", sorted(fields))
    return MetadataIndex(
        name,
        None if offset is None else _size(offset, "offset"),
        None if index is None else _count(index, "index"),
    )


def _place(value: Any) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo", "relative_path", "offset", "length")
    name = _text(fields["relative_path"], "relative_path")
    plain = name not in ("", ".", "..") and "/" not in name and "\\" not in name
    _need(plain, "relative_path", name)
    return _StorageInfo(
        name, _count(fields["offset"], "offset"), _count(fields["length"], "length")
    )


def _plan(value: Any) -> dict[str, tuple[str | int, ...]]:
    """DCP's own planner: where in a nested dict each key stood."""
    paths = _table(value, "planner_data")
    for key, path in paths.items():
        plain = isinstance(path, tuple) and all(isinstance(part, str | int) for part in path)
        _need(isinstance(key, str) and plain, "planner_data", (key, path))
    return dict(paths)


def _origin(value: Any) -> StorageMeta:
    fields = _fields(value, "StorageMeta", "checkpoint_id", "save_id", "load_id", "modules")
    path = fields["checkpoint_id"]
    if isinstance(path, _StandIn):
        _need(path.kind in _PATHS, "checkpoint_id", path)
        path = str(PurePath(*(_text(part, "checkpoint_id") for part in path.args)))
    texts = [path, fields["save_id"], fields["load_id"]]
    modules = fields["modules"]
    _need(all(text is None or isinstance(text, str) for text in texts), "storage_meta", texts)
    plain = isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    _need(plain, "modules", modules)
    return StorageMeta(
        checkpoint_id=path,
        save_id=fields["save_id"],
        load_id=fields["load_id"],
        modules=list(modules),
    )


def _is(value: Any, name: str) -> TypeGuard[_StandIn]:
    return isinstance(value, _StandIn) and value.kind[1] == name


def _fields(value: Any, name: str, *required: str) -> dict[str, Any]:
    """The state of a stand-in for a dataclass; just those fields, where any are named."""
    _need(_is(value, name) and not value.args, name, value)
    state = _table(value.state, name)
    _need(not required or set(state) == set(required), f"fields of {name}", list(state))
    return dict(state)


def _table(value: Any, what: str) -> Mapping[Any, Any]:
    _need(isinstance(value, dict), what, value)
    table: Mapping[Any, Any] = value
    return table


def _size(value: Any, what: str) -> torch.Size:
    _need(_is(value, "Size") and len(value.args) == 1, what, value)
    (sizes,) = value.args
    _need(isinstance(sizes, tuple), what, sizes)
    return torch.Size([_count(size, what) for size in sizes])


def _count(value: Any, what: str) -> int:
    _need(isinstance(value, int) and not isinstance(value, bool) and value >= 0, what, value)
    return int(value)


def _text(value: Any, what: str) -> str:
    _need(isinstance(value, str), what, value)
    return str(value)


def _need(holds: bool, what: str, value: object) -> None:
    if isinstance(value, _StandIn):
        value = value.kind
    if not holds:
        raise ValueError(f"{what} must be as DCP writes it; got {str(value)[:200]}")
