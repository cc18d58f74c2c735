# SPDX-License-Identifier: Apache-2.0
"""torch.load with weights_only=True, and errors that say what was refused and nothing else."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

StandIns = Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]]
"""What to build in place of classes, with their full names."""
_GLOBAL = re.compile(r"GLOBAL (\S+)")


def load_safely(source: Path | io.BytesIO, what: str, stand_ins: StandIns = ()) -> Any:
    """Tensors, numbers, words and tables, on the CPU; no code of the file runs.

    Raises:
        ValueError: torn, or with other objects; names ``what`` and the first of them.
    """
    try:
        with torch.serialization.safe_globals(list(stand_ins)):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        # torch's own text recommends to load it without these checks.
        found = _GLOBAL.search(str(error))
        why = f"it has {found[1]}" if found else str(error).partition("\n")[0]
        raise ValueError(
            f"a file must load with weights_only=True, so hold nothing but tensors, numbers, words "
            f"and tables; {what}: {why}. Save it without other objects."
        ) from error
