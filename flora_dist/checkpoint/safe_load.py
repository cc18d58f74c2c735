# SPDX-License-Identifier: Apache-2.0
"""torch.load with weights_only=True, and errors that say what was refused and nothing else."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flora_dist.checkpoint.files import open_plain

StandIns = Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]]
"""What to build in place of classes, with their full names."""
_GLOBAL = re.compile(r"GLOBAL (\S+)")


def load_safely(source: Path | io.BytesIO, what: str, stand_ins: StandIns = ()) -> Any:
    """Tensors, numbers, words and tables, on the CPU; no code of the file runs.

    It takes no more memory than the file is long.

    Raises:
        ValueError: torn, packed, or with other objects; names ``what`` and the first of them.
    """
    try:
        with source if isinstance(source, io.BytesIO) else open_plain(source) as stream:
            _check_unpacked(stream)
            with torch.serialization.safe_globals(list(stand_ins)):
                loaded = torch.load(stream, map_location="cpu", weights_only=True)
        _check_backed(loaded)
    # Of a foreign file: any error at all (UnpicklingError, EOFError, KeyError, MemoryError).
    except Exception as error:
        # torch's own text recommends to load it without these checks.
        found = _GLOBAL.search(str(error))
        why = f"it has {found[1]}" if found else str(error).partition("\n")[0]
        raise ValueError(
            "a file must load with weights_only=True, so it may hold only tensors, numbers, "
            f"words and tables; {what}: {why}. Save it without other objects."
        ) from error
    return loaded


def check_memory(num_bytes: int, what: str) -> None:
    """Refuse to read more at once than this machine has memory: a file may be all holes.

    Raises:
        ValueError: saying how much there is.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > memory:
        raise ValueError(
            f"what is read at once must fit into memory; {what} has {num_bytes} bytes, this "
            f"machine {memory}. Convert it on a larger one."
        )


def _check_unpacked(stream: BinaryIO) -> None:
    """As torch.save writes: entries that are not compressed and share no bytes.

    The format before it, of torch 1.5 and older, takes memory for whatever sizes it names.
    """
    length = stream.seek(0, io.SEEK_END)
    check_memory(length, "it")
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
    stream.seek(0)
    packed = [each for each in entries if each.compress_type != zipfile.ZIP_STORED]
    if packed or sum(each.file_size for each in entries) > length:
        raise ValueError("its entries are compressed, or overlap")


def _check_backed(loaded: Any) -> None:
    """Refuse tensors of more elements than they store: a copy would take memory for all of them."""
    waiting, seen = [loaded], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(value.shape)} does not store them all")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif hasattr(value, "__dict__"):  # a stand-in
            waiting += vars(value).values()
