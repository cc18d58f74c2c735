# SPDX-License-Identifier: Apache-2.0
"""What to say when ranks differ: the field, who differs from most, both values, and a remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Field = Mapping[str, Mapping[str, Any]]
"""Values that must be equal on all ranks, by parameter and key; "" stands for all parameters."""
Row = tuple[str, str, list[str | None]]
"""A parameter, a key, and each rank's value as text; None where it has none."""

_REMEDIES = {
    "names": (
        "Build the same model and optimizer on every rank; where ranks hold other layers, call "
        "check_consistency(group) among those that hold the same"
    ),
    "seed": "Pass the same seed on every rank",
    "settings": "Construct the optimizer and step its schedulers alike on every rank",
    "level": "Attach gradients with the same arguments on every rank",
    "steps": "Load the same checkpoint on every rank, and call step() equally often",
    "statistics": (
        "Replicas have drifted apart: go back to a checkpoint on every rank. If the ranks are "
        "meant to differ there, call check_consistency(group) among those that hold the same"
    ),
}
_MOST_RANKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one rank says once it is known that ranks differ."""

    rank: int
    fields: Mapping[str, Field]
    """Those that differ anywhere, in the order of cause and effect."""
    statistics: Field
    """Fingerprints of what this rank holds of parameters whose statistics differ anywhere."""
    groups: Mapping[str, int]
    """Index of each parameter's group."""


def complaint(everyone: Iterable[Said]) -> str:
    """The message, the same on every rank, from what all ranks said."""
    everyone = sorted(everyone, key=lambda said: said.rank)
    ranks, fields = [said.rank for said in everyone], list(everyone[0].fields)
    if fields:
        has_drifted = any(said.statistics for said in everyone)
        field, also = fields[0], [*fields[1:], *(["statistics"] if has_drifted else [])]
        rows = _rows([said.fields[field] for said in everyone])
        name, key, values = next(row for row in rows if len(set(row[2])) > 1)
        what = f"{_subject(name, key, everyone[0], field)} is {_by_value(ranks, values)}"
    else:
        field, also = "statistics", []
        rows = _rows([said.statistics for said in everyone])
        name, key, values = next(row for row in rows if len({*row[2]} - {None}) > 1)
        what = f"{key} of {name!r} {_by_rank(ranks, values)}"
    more = f" ({' and '.join(also)} differ too)" if also else ""
    return f"all ranks must have the same {field}; {what}{more}. {_REMEDIES[field]}."


def _rows(held: Sequence[Field]) -> Iterator[Row]:
    for name in sorted({name for field in held for name in field}):
        for key in dict.fromkeys(key for field in held for key in field.get(name, {})):
            each = (field.get(name, {}) for field in held)
            yield name, key, [repr(values[key]) if key in values else None for values in each]


def _subject(name: str, key: str, said: Said, field: str) -> str:
    if not name:
        return key
    group = f" (group {said.groups[name]})" if field == "settings" and name in said.groups else ""
    return f"{key} of {name!r}{group}"


def _by_value(ranks: Sequence[int], values: Sequence[str | None]) -> str:
    """Most ranks' value last, as what was expected."""
    counts = Counter(values)
    usual = counts.most_common(1)[0][0]
    parts = []
    for value in sorted(counts, key=lambda value: value == usual):
        having = [rank for rank, own in zip(ranks, values, strict=True) if own == value]
        parts.append(f"{value or 'absent'} on {_named(having)}")
    return " and ".join(parts)


def _by_rank(ranks: Sequence[int], values: Sequence[str | None]) -> str:
    """Of those that hold it."""
    held = {rank: value for rank, value in zip(ranks, values, strict=True) if value is not None}
    usual = Counter(held.values()).most_common(1)[0][0]
    others = [rank for rank, value in held.items() if value != usual]
    alike = [rank for rank in held if rank not in others]
    return f"on {_named(others)} is another than on {_named(alike)}"


def _named(ranks: Sequence[int]) -> str:
    """The ranks in words.

    >>> _named([1]), _named([0, 2]), _named(range(20))
    ('rank 1', 'ranks 0, 2', 'ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more')
    """
    listed = ", ".join(map(str, ranks[:_MOST_RANKS]))
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}"
