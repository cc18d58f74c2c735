# SPDX-License-Identifier: Apache-2.0
"""State of schedulers and the like as JSON and back: numbers and words, never pickled objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_dist.checkpoint.folder import Json


def to_json(value: Any, where: str) -> Json:
    """Numbers, words, lists, tuples and tables of them; tables may be keyed by whole numbers.

    >>> to_json({"last_epoch": 3, "milestones": {30: 1}, "rates": (0.1, 0.2)}, "it")
    {'last_epoch': 3, 'milestones': {'30': 1}, 'rates': [0.1, 0.2]}

    Raises:
        ValueError: anything else, naming ``where`` it stands.
    """
    if value is None or type(value) in {bool, int, float, str}:
        return value  # type: ignore[no-any-return]
    if isinstance(value, list | tuple):
        return [to_json(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, Mapping) and {type(key) for key in value} in (set(), {str}, {int}):
        return {str(key): to_json(entry, f"{where}.{key}") for key, entry in value.items()}
    raise ValueError(
        "a checkpoint keeps numbers, words, lists and tables of them; "
        f"{where} is {type(value).__module__}.{type(value).__qualname__}. Build it of plain ones."
    )


def split(entries: Mapping[str, Any]) -> tuple[dict[str, Json], tuple[str, ...]]:
    """What of a table is numbers and words, and the names of the rest.

    >>> split({"seen": 3, "generator": object()})
    ({'seen': 3}, ('generator',))
    """
    kept = {name: _or_ellipsis(value, name) for name, value in entries.items()}
    left_out = tuple(name for name, value in kept.items() if value is ...)
    return {name: value for name, value in kept.items() if value is not ...}, left_out


def _or_ellipsis(value: Any, where: str) -> Any:
    try:
        return to_json(value, where)
    except ValueError:
        return ...


def from_json(saved: Json, like: Any) -> Any:
    """What ``to_json`` was given; ``like`` tells tuples and special tables.

    >>> from_json({"milestones": {"30": 1}, "rates": [0.1]}, {"milestones": {9: 1}, "rates": (1,)})
    {'milestones': {30: 1}, 'rates': (0.1,)}
    """
    if isinstance(saved, list):
        same = isinstance(like, list | tuple) and len(like) == len(saved)
        entries = [from_json(s, like[i] if same else None) for i, s in enumerate(saved)]
        return tuple(entries) if isinstance(like, tuple) else entries
    if not isinstance(saved, dict):
        return saved
    known = like if isinstance(like, Mapping) else {}
    if known and all(type(key) is int for key in known):
        numbered = {int(key): from_json(entry, known.get(int(key))) for key, entry in saved.items()}
        return type(known)(numbered)  # type: ignore[call-arg]
    return {key: from_json(entry, known.get(key)) for key, entry in saved.items()}
