# SPDX-License-Identifier: Apache-2.0
"""Values of a transformers config, each checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One config; a key that is missing or null has its default.

    All raise ``ValueError``, naming the file and the key.
    """

    path: Path
    settings: Mapping[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; required where there is no default."""
        value = self.settings.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{key} must be a whole number of at least 1; {str(self.path)!r} has {value!r}. "
                "Correct the file."
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.settings.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all of them
                f"{key} must be true or false; {str(self.path)!r} has {value!r}. Correct the file."
            )
        return value

    def places(self, key: str) -> frozenset[int]:
        """A list of places of layers."""
        value = self.settings.get(key) or []
        if not isinstance(value, list) or any(type(place) is not int for place in value):
            raise ValueError(
                f"{key} must be a list of whole numbers; {str(self.path)!r} has {value!r}. "
                "Correct the file."
            )
        return frozenset(value)

    def head_width(self, hidden: int, heads: int, default: int | None = None) -> int:
        """``head_dim``, by default that of the family, or the share of the hidden size."""
        if self.settings.get("head_dim") is not None or default is not None:
            return self.size("head_dim", default)
        return self.heads_of(hidden, heads)

    def heads_of(self, hidden: int, heads: int) -> int:
        """The width of a head where together they have the hidden size."""
        if hidden % heads:
            raise ValueError(
                f"the hidden size must be a multiple of the heads; {str(self.path)!r} has {hidden} "
                f"and {heads}. Correct the file."
            )
        return hidden // heads
