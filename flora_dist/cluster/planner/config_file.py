# SPDX-License-Identifier: Apache-2.0
"""A model from its transformers config: a file, or a folder with a config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from flora_dist.cluster.planner.decoders import DECODERS, decoder
from flora_dist.cluster.planner.gpt2 import gpt2
from flora_dist.cluster.planner.model import Model
from flora_dist.cluster.planner.reader import Reader
from flora_dist.cluster.planner.t5 import t5

CONFIG = "config.json"
"""Its name in a folder that ``save_pretrained`` has written."""
FAMILIES: Mapping[str, Callable[[str, Reader], Model]] = {
    **{name: partial(decoder, family) for name, family in DECODERS.items()},
    "gpt2": gpt2,
    "t5": t5,
}
"""``model_type`` -> what builds such a model from its name and config."""


def read_model(path: Path, *, vocabulary: int | None = None) -> Model:
    """Read a transformers config.

    Args:
        path: a JSON file with a ``model_type``, or a folder with such a config.json.
        vocabulary: tokens; None: the file's.

    Raises:
        ValueError: the file cannot be read, is not a JSON object, names an unknown family, or
            has a size that is not a whole number above 0.
    """
    file = path / CONFIG if path.is_dir() else path
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--model must be a transformers config in JSON, or a folder with a {CONFIG}; "
            f"{str(path)!r} gave: {error}. See configs/model for examples."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all of them
            f"--model must hold a JSON object; {str(file)!r} holds {type(settings).__name__}. See "
            "configs/model for examples."
        )
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"--model must be of a known family, one of {', '.join(FAMILIES)}; {str(file)!r} has "
            f"model_type {family!r}. Describe the network by the nearest of them."
        )
    if vocabulary is not None:
        settings["vocab_size"] = vocabulary
    name = path.resolve().name if path.is_dir() else path.stem
    return FAMILIES[family](name, Reader(path=file, settings=settings))
