# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's JSON config under a run's: what both say must agree, what it lacks is filled in."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_dist.frameworks.deepspeed.config import ALONE, check_filled_in, check_flora_block
from flora_dist.trainer.config import DENSE, PURE, Config
from flora_dist.trainer.optimizers import LABELS
from flora_dist.trainer.utf8 import read_utf8

_AUTO = "auto"  # the word with which Accelerate and the Hugging Face Trainer ask for filling in
# DeepSpeed ignores top-level keys that it does not know: a slip in one of these would go unnoticed.
_SPELLED = (
    *("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "flora"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "communication_data_type", "data_types", "steps_per_print"),
)
# Key of the "flora" block -> key of the run's gradients section.
_GRADIENTS = {
    "gradients": "level",
    "gradient_rank": "rank",
    "gradient_bits": "bits",
    "wire_bits": "wire_bits",
    "wire_dtype": "wire_dtype",
    "bucket_cap_mb": "bucket_cap_mb",
}
_ELSEWHERE = {
    "scheduler": "the schedule section moves the learning rate",
    "fp16": "steps that overflow are skipped and would shift the schedule; bf16 needs no scale",
    "bfloat16": "it is the old name of bf16",
    "torch_autocast": "train.precision says the arithmetic: bfloat16 turns bf16 on",
}


def engine_settings(config: Config, world_size: int) -> dict[str, Any]:
    """The config for DeepSpeed, without an optimizer block.

    Raises:
        ValueError: the file is no JSON object, or contradicts the run's config.
    """
    settings = _changed(_read(Path(config.backend.config or "")), config.backend.changes)
    _check_spelling(settings)
    for key, why in _ELSEWHERE.items():
        block = settings.get(key)
        is_off = isinstance(block, Mapping) and key != "scheduler" and not block.get("enabled")
        if block is not None and not is_off:
            raise _refused(key, f"is not for the trainer: {why}")
    try:
        block = _flora_block(config, settings)
    except TypeError as error:
        raise ValueError(f"{config.backend.config}: {error}") from error
    if "flora" in settings or config.gradients.level != DENSE:
        settings["flora"] = block
    _check_optimizer(config, settings)
    train = config.train
    together = train.micro_batch * world_size
    for key, value, ours in (
        ("train_batch_size", train.global_batch, "train.global_batch"),
        ("train_micro_batch_size_per_gpu", train.micro_batch, "train.micro_batch"),
        (
            "gradient_accumulation_steps",
            train.global_batch // together,
            f"train.global_batch / (train.micro_batch x {world_size} processes)",
        ),
        # 0 turns it off: without the key DeepSpeed 0.19 clips at 1.
        ("gradient_clipping", train.max_grad_norm or 0.0, "train.max_grad_norm"),
    ):
        settings[key] = _agreed(key, settings.get(key, _AUTO), value, ours)
    low = settings.get("bf16", {})
    if not isinstance(low, Mapping):
        raise _refused("bf16", f"must be an object; it is {low!r}")
    enabled = low.get("enabled", _AUTO)
    is_pure = train.precision == PURE
    is_low = is_pure or train.precision == "bfloat16"
    enabled = _agreed("bf16.enabled", enabled, is_low, "train.precision")
    settings["bf16"] = {**low, "enabled": enabled}
    alone = _agreed(f"bf16.{ALONE}", low.get(ALONE, _AUTO), is_pure, "train.precision")
    if alone:
        # Without the second DeepSpeed asks for its own CPU Adam.
        settings["bf16"] |= {ALONE: True, "bf16_optimizer_states": True}
    check_filled_in(settings)
    return {key: value for key, value in settings.items() if key != "optimizer"}


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(read_utf8(path), object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}. Correct the text.") from error
    if not isinstance(tree, dict):
        raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all config errors
            f"a DeepSpeed config must be a JSON object; {path} holds {tree!r}. "
            "See configs/deepspeed."
        )
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(
            f"a DeepSpeed config may hold each key only once; {twice[0]!r} appears twice. Remove "
            "one."
        )
    return dict(pairs)


def _changed(
    tree: Mapping[str, Any], changes: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """A copy with `changes` laid over it: sections are merged, None takes a key out (RFC 7396)."""
    result = dict(tree)
    for key, value in changes.items():
        if value is None:
            if key not in result:
                near = difflib.get_close_matches(key, result, n=1)
                known = ", ".join(result) or "none"
                hint = f"Did you mean {near[0]!r}?" if near else f"Its keys: {known}."
                raise ValueError(
                    "backend.changes can only remove keys that the JSON has; it has no "
                    f"{where + key!r}. {hint}"
                )
            del result[key]
        elif isinstance(value, Mapping):
            below = result.get(key)
            below = below if isinstance(below, Mapping) else {}
            result[key] = _changed(below, value, f"{where}{key}.")
        else:
            result[key] = value
    return result


def _check_spelling(settings: Mapping[str, Any]) -> None:
    for key in settings:
        near = difflib.get_close_matches(key, _SPELLED, n=1, cutoff=0.85)
        if near and key not in _SPELLED:
            raise ValueError(
                f"DeepSpeed knows no key {key!r} and would ignore it. Did you mean {near[0]!r}?"
            )


def _check_optimizer(config: Config, settings: Mapping[str, Any]) -> None:
    """The run's optimizer section decides; a block that says the same may stand."""
    block = settings.get("optimizer")
    if block is None:
        return
    section = config.optimizer
    ours = {"type": LABELS[section.name], "params": json.loads(json.dumps(dict(section.options)))}
    if block != ours:
        raise _refused("optimizer", f"says {block!r}, the optimizer section {ours!r}")


def _flora_block(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run's gradients section as the engine reads it; a block that says the same may stand."""
    section = config.gradients
    ours: dict[str, Any] = {"gradients": section.level}
    if section.level != DENSE:
        ours |= {"wire_dtype": section.wire_dtype}
        optional = {
            "gradient_rank": section.rank,
            "gradient_bits": section.bits,
            "wire_bits": section.wire_bits,
            "bucket_cap_mb": section.bucket_cap_mb,
        }
        ours |= {key: value for key, value in optional.items() if value is not None}
    block = settings.get("flora", {})
    if isinstance(block, Mapping):
        block = {key: value for key, value in block.items() if value != _AUTO}
        if block.get("gradients", section.level) == section.level:
            block = {**ours, **block}
    check_flora_block({**settings, "flora": block})
    return {
        key: _agreed(f"flora.{key}", value, ours.get(key), f"gradients.{_GRADIENTS[key]}")
        for key, value in block.items()
    }


def _agreed(key: str, theirs: Any, ours: Any, name: str) -> Any:
    if theirs not in (_AUTO, ours):
        raise _refused(key, f"is {theirs!r}, but {name} makes it {ours!r}")
    return ours


def _refused(key: str, fact: str) -> ValueError:
    return ValueError(
        f"the DeepSpeed config must agree with the run's; its {key!r} {fact}. Change one, or let "
        f"the run's decide: --set backend.changes.{key}=null."
    )
