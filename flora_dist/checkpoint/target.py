# SPDX-License-Identifier: Apache-2.0
"""What a caller gives a save beside model and optimizer, in the types that a checkpoint keeps."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.folder import Json

_DEEPEST = 64
"""Levels of lists and tables; Python's own reader and writer of JSON end at some hundreds."""
_GREATEST = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a checkpoint goes, and what the caller keeps with it."""

    folder: Path
    """Of all checkpoints of a run; on storage that every rank sees."""
    tag: str
    """The checkpoint's own name in it."""
    step: int
    """Steps done."""
    extra: Mapping[str, Json]
    """The caller's own numbers and words."""
    keep: int | None
    """Checkpoints to keep, this one among them; None: all."""


def target_of(
    folder: str | Path, *, step: Any, extra: Any = None, keep: Any = None, tag: Any = None
) -> Target:
    """Whatever counts as a whole number or a table, as an ``int`` or a ``dict`` of its own.

    Raises:
        ValueError: anything else, naming it.
    """
    step = _whole("step", step)
    keep = None if keep is None else _whole("keep", keep)
    folders.check_keep(keep)
    tag = folders.tag_of(step) if tag is None else tag
    folders.check_tag(tag)
    copied = copy_of({} if extra is None else extra, "extra")
    if not isinstance(copied, dict):
        raise ValueError(  # noqa: TRY004 - as for every other value that cannot be saved
            f"extra must be a table keyed by strings; got {type(extra).__name__}. Pass a dict."
        )
    return Target(folder=Path(folder), tag=tag, step=step, extra=copied, keep=keep)


def copy_of(value: Any, place: str, depth: int = 0) -> Json:
    """Plain Python's form of a value: mappings as dicts, numbers of NumPy and tensors of one.

    >>> from types import MappingProxyType
    >>> copy_of(MappingProxyType({"epoch": 2, "list": [None, 0.5]}), "extra")
    {'epoch': 2, 'list': [None, 0.5]}

    Raises:
        ValueError: what JSON cannot hold, or would give back as something else; naming ``place``.
    """
    if depth > _DEEPEST:
        raise ValueError(
            f"what a checkpoint keeps beside tensors must be nested in at most {_DEEPEST} levels; "
            f"{place[:80]}... goes deeper. Flatten it, and check that it does not contain itself."
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise _unwritable(f"the key {wrong[0]!r} of {place}", wrong[0])
        return {str(key): copy_of(each, f"{place}.{key}", depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        return [copy_of(each, f"{place}[{i}]", depth + 1) for i, each in enumerate(value)]
    return _number(value, place)


def _number(value: Any, place: str) -> int | float | bool:
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex():
            raise _unwritable(place, value)
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real) and not hasattr(value, "__index__"):
        return float(value)
    try:
        return operator.index(value)
    except TypeError:
        raise _unwritable(place, value) from None


def _whole(name: str, value: Any) -> int:
    """A count of steps or checkpoints; NumPy's and tensors of one number too."""
    found = None
    if not isinstance(value, bool):
        try:
            found = operator.index(value)
        except TypeError:
            found = None
    if found is None or not (name == "keep" or 0 <= found <= _GREATEST):
        raise ValueError(
            f"{name} must be a whole number from 0 to 2^63 - 1; got {value!r}. Pass an int."
        )
    return found


def _unwritable(place: str, value: object) -> ValueError:
    return ValueError(
        "what a checkpoint keeps beside tensors must be None, booleans, numbers, strings, lists, "
        f"and tables keyed by strings; {place} is a {type(value).__name__}. Convert it first."
    )
