# SPDX-License-Identifier: Apache-2.0
"""Checks of single settings, which say name, rule, value and remedy. Standard library only."""

from __future__ import annotations

import difflib
import sys
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(name: str, value: Any, *, smallest: int, none_means: str = "") -> None:
    """Refuse what is no whole number of at least ``smallest``, nor None where that means much."""
    if value is None and none_means:
        return
    if not is_whole(value) or value < smallest:
        remedy = f", or None to {none_means}" if none_means else ""
        raise ValueError(
            f"{name} must be a whole number of at least {smallest}; got {value!r}. "
            f"Pass {smallest} or more{remedy}."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices; what was nearly one is named."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else " Pass one of these."
    raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.{hint}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number in [low, high)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An int may be below infinity and above all floats.
    if not is_number or not low <= value < high or value > sys.float_info.max:
        raise ValueError(
            f"{name} must be a number in [{low:g}, {high:g}); got {value!r}. "
            "Pass a finite number in that range."
        )
