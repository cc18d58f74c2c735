# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of a DeepSpeed engine beside weights and state, under ``extra``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flora_dist.checkpoint.folder import Json, Manifest

ENGINE = "deepspeed"
"""Its name in ``extra``."""
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves of a dynamic loss scale, by DeepSpeed's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Counters, scheduler and loss scale; the steps done stand in the manifest itself."""

    global_samples: int
    skipped_steps: int
    scheduler: Json
    """None: it had none."""
    loss_scale: dict[str, Json] | None
    """None: a loss was not scaled, or always by the same number."""

    def as_json(self) -> Json:
        """As ``facts_in`` reads it."""
        return asdict(self)

    def loss_scale_for(self, attributes: Mapping[str, Any]) -> dict[str, Json]:
        """What to set of a scaler; nothing unless both scale dynamically."""
        if self.loss_scale is None or scale_of(attributes) is None:
            return {}
        return {name: value for name, value in self.loss_scale.items() if name in attributes}


def scale_of(attributes: Mapping[str, Any]) -> dict[str, Json] | None:
    """What moves of a scaler with these attributes; None unless it is dynamic."""
    if not attributes.get("dynamic", attributes.get("dynamic_loss_scale", False)):
        return None
    return {name: attributes[name] for name in _SCALE if name in attributes}


def facts_in(manifest: Manifest) -> EngineFacts | None:
    """What an engine has written into a checkpoint; None: no engine wrote it.

    Raises:
        ValueError: naming the field that is missing or of another kind.
    """
    extra = manifest.facts.get("extra")
    if not isinstance(extra, dict) or ENGINE not in extra:
        return None
    saved = extra[ENGINE]
    facts = saved if isinstance(saved, dict) else {}
    return EngineFacts(
        global_samples=_field(facts, "global_samples", _is_count),
        skipped_steps=_field(facts, "skipped_steps", _is_count),
        scheduler=_field(facts, "scheduler", lambda value: isinstance(value, dict | None)),
        loss_scale=_field(facts, "loss_scale", _is_loss_scale),
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_loss_scale(value: Any) -> bool:
    """Numbers by the names of what moves; DeepSpeed begins to count overflows at -1."""
    if not isinstance(value, dict):
        return value is None
    counts = [number for name, number in value.items() if name != "cur_scale"]
    scale = value.get("cur_scale", 1.0)
    is_scale = isinstance(scale, int | float) and not isinstance(scale, bool)
    return (
        set(value) <= set(_SCALE)
        and all(number == -1 or _is_count(number) for number in counts)
        and is_scale
        and 0.0 < scale <= sys.float_info.max
    )


def _field(facts: Mapping[str, Json], name: str, fits: Callable[[Any], bool]) -> Any:
    value = facts.get(name, ...)
    if not fits(value):
        found = "is missing" if value is ... else f"is {value!r}"
        raise ValueError(
            f"what a checkpoint stores of an engine must be complete; extra.{ENGINE}.{name} "
            f"{found}. Load another checkpoint."
        )
    return value
