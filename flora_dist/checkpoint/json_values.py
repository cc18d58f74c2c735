# SPDX-License-Identifier: Apache-2.0
"""State of schedulers and the like as JSON and back: numbers and words, never pickled objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
        f"a checkpoint keeps numbers, words, lists and tables of them; {where} is "
        f"{type(value).__module__}.{type(value).__qualname__}. Convert it to these first."
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


def check_like(saved: Json, like: Any, where: str) -> None:
    """Refuse a saved value where the running one is of another kind; None may become anything.

    >>> check_like({"last_epoch": 3, "rates": [0.1]}, {"last_epoch": 0, "rates": (0.5,)}, "it")
    >>> check_like("a", 0.5, "lr")
    Traceback (most recent call last):
    ValueError: a saved value must be of the same kind as the running one; lr is 'a', here \
it is 0.5. Load a checkpoint of the same optimizer and scheduler.

    Raises:
        ValueError: naming ``where`` it stands.
    """
    if saved is None or like is None:
        return
    kinds: tuple[Any, ...] = (bool, str, int | float, list | tuple, Mapping)
    kind = next((kind for kind in kinds if isinstance(like, kind)), None)
    fits = kind is None or isinstance(saved, kind)
    if kind not in (None, bool):
        fits = fits and not isinstance(saved, bool)
    if not fits or saved != saved:
        raise ValueError(
            f"a saved value must be of the same kind as the running one; {where} is "
            f"{str(saved)[:200]!r}, here it is {like!r}. Load a checkpoint of the same optimizer "
            "and scheduler."
        )
    if isinstance(saved, dict) and isinstance(like, Mapping):
        for key in like.keys() & saved.keys():
            check_like(saved[key], like[key], f"{where}.{key}")
    if isinstance(saved, list) and isinstance(like, list | tuple):
        for index, (each, here) in enumerate(zip(saved, like, strict=False)):
            check_like(each, here, f"{where}[{index}]")


def filled_like(here: Any, value: Any, name: str) -> Any:
    """A saved number as a tensor where the group has one, as schedules inside graphs do.

    Raises:
        ValueError: the tensor's dtype cannot hold it.
    """
    if not isinstance(here, Tensor):
        return value
    try:
        made = torch.full_like(here, value)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"a saved {name} must fit the tensor that the group has; {value!r}: {error}. Load "
            "another checkpoint."
        ) from error
    return made


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
