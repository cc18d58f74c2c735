# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed JSON config: its "optimizer" and "flora" blocks, and what Flora has to have set."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flora_dist.optim.config import KNOBS
from flora_dist.optim.spec import LEVELS

TYPE = "Flora"
_SETTINGS = ("lr", "weight_decay", "maximize", *KNOBS)
_AVAILABLE = LEVELS[:1]
_OFFLOAD = "zero_optimization.offload_optimizer"
_REFUSED: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    (
        "DeepCompile",
        "compile.deepcompile",
        bool,
        "it steps inside its own graph. Remove compile.deepcompile; engine.compile() works",
    ),
    (
        "AutoTP",
        "tensor_parallel.autotp_size",
        lambda size: size > 1,
        "row statistics would miss the columns on other ranks. Set tensor_parallel.autotp_size to "
        "0, or use FSDP2 with tensor parallelism",
    ),
    (
        "ZenFlow",
        "zero_optimization.zenflow",
        lambda block: block is not None,
        "it updates chosen columns apart. Remove zenflow",
    ),
    (
        "SuperOffload",
        f"{_OFFLOAD}.super_offload",
        bool,
        "it steps on its own. Remove super_offload",
    ),
    (
        "partial offload",
        f"{_OFFLOAD}.ratio",
        lambda ratio: ratio < 1,
        "partitions lie on two devices. Set offload_optimizer.ratio to 1",
    ),
    (
        "ZeRO++ hpZ",
        "zero_optimization.zero_hpz_partition_size",
        lambda size: size > 1,
        "partitions are kept twice. Set zero_hpz_partition_size to 1",
    ),
    (
        "ZeRO++ qgZ",
        "zero_optimization.zero_quantized_gradients",
        bool,
        "gradients from its own all-to-all were never compared. Leave it out",
    ),
    (
        "elastic checkpoints",
        "zero_optimization.elastic_checkpoint",
        bool,
        "they pad and cut states as if these were as long as the partition. Leave it out; "
        "engine.save_checkpoint works at the same number of ranks",
    ),
    (
        "universal checkpoints",
        "checkpoint.load_universal",
        bool,
        "DeepSpeed's converter knows Adam's states alone. Leave it out",
    ),
    (
        "NVMe offload of the optimizer",
        f"{_OFFLOAD}.device",
        lambda device: device == "nvme",
        # Tried with libaio: steps equal those of CPU offload bit for bit.
        "it steps right, but load_checkpoint of DeepSpeed 0.19 reads its swap files alone, and "
        "Flora's state would be lost. Offload to the CPU",
    ),
    (
        "NVMe offload of parameters",
        "zero_optimization.offload_param.device",
        lambda device: device == "nvme",
        # Tried with libaio: steps equal those without it bit for bit. Loading ends in
        # AttributeError in stage3.py's _rigid_load_state_dict, with AdamW too.
        "it steps right, but load_checkpoint of DeepSpeed 0.19 fails on parameters that are on "
        "disk. Offload to the CPU",
    ),
)
"""What it is called, where it stands, whether it is on, and why not."""


def check_features(config: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would compute wrong with Flora, or fail at with a riddle.

    Raises:
        ValueError: such a feature is on.
    """
    for name, path, is_on, why in _REFUSED:
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and is_on(value):
            raise refusal(name, why)


def refusal(feature: str, why: str) -> ValueError:
    """The error for a feature; ``why`` ends with a remedy."""
    return ValueError(f"Flora under DeepSpeed cannot go with {feature}: {why}.")


def check_flora_block(config: Mapping[str, Any]) -> None:
    """Refuse a "flora" block that says what this version cannot do.

    Raises:
        ValueError: an unknown key or level.
    """
    for key in config:
        if key != "flora" and key.lower() == "flora":
            raise ValueError(
                f'the config\'s block of Flora is called "flora"; got {key!r}, which DeepSpeed '
                "would ignore. Rename it."
            )
    block = config.get("flora", {})
    _check_keys("flora", block, ("gradients",))
    level = block.get("gradients", LEVELS[0])
    if level not in _AVAILABLE:
        raise ValueError(
            f'"flora"."gradients" must be one of {", ".join(_AVAILABLE)} in this version; got '
            f"{level!r}. Leave it out, or set it to {_AVAILABLE[0]!r}."
        )


def check_filled_in(config: Mapping[str, Any], where: str = "") -> None:
    """Refuse "auto": DeepSpeed itself takes it for its own default, bf16 for off, or fails.

    Raises:
        ValueError: naming the first such key.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_filled_in(value, f"{where}{key}.")
        elif value == "auto":
            raise ValueError(
                f'every value of the config must be filled in; {where}{key} is "auto", which only '
                "the Hugging Face Trainer and accelerate fill in. Write the value, or leave the "
                "key out for DeepSpeed's default, or call attach on the engine they build."
            )


def optimizer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Flora in the "optimizer" block.

    Raises:
        ValueError: another type, or a setting that Flora does not have.
    """
    block = config.get("optimizer")
    if block is None:
        raise ValueError(
            'a config without an optimizer object needs an "optimizer" block; it has none. Add '
            '"optimizer": {"type": "Flora", "params": {"lr": 1e-3}}.'
        )
    _check_keys("optimizer", block, ("type", "params"))
    if block.get("type") != TYPE:
        raise ValueError(
            f'"optimizer"."type" must be {TYPE!r}; got {block.get("type")!r}. Write {TYPE!r}, or '
            "call deepspeed.initialize for another optimizer."
        )
    settings = dict(block.get("params", {}))
    _check_keys("optimizer.params", settings, _SETTINGS)
    return settings


def prepared(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the "optimizer" block, as DeepSpeed needs it for an optimizer object.

    The two keys let ZeRO take an optimizer that is not DeepSpeed's own, also with offload.

    Raises:
        ValueError: a key says the contrary.
    """
    needed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"Flora under ZeRO needs {key!r}: {str(value).lower()}; the config says "
                f"{config[key]!r}. Leave it out."
            )
    kept = {key: value for key, value in config.items() if key != "optimizer"}
    return {**copy.deepcopy(kept), **needed}


def _check_keys(block: str, given: Any, known: Collection[str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f'the block "{block}" must be an object; got {given!r}. Write {{...}}.')
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise ValueError(f'the block "{block}" has the unknown key {key!r}. {hint}')
