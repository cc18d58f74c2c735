# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed JSON config: its "optimizer" and "flora" blocks, and what Flora has to have set."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from flora_dist.core.state.settings import KNOBS
from flora_dist.core.state.spec import LEVELS
from flora_dist.gradients.request import WIRE_DTYPES, SketchRequest

TYPE = "Flora"
TESTED = "0.19.8"
"""The DeepSpeed whose private names are known."""
ALONE = "bf16_master_weights_and_grads"
"""Of the "bf16" block: weights in bfloat16 and no others."""
_OF_GROUPS = ("lr", "weight_decay", "maximize", *KNOBS)
_SETTINGS = (*_OF_GROUPS[:3], "check_every", "roles", *KNOBS)
_AVAILABLE = ("dense", "compressed", "fused")
_GRADIENTS = (
    *("gradients", "gradient_rank", "gradient_bits", "wire_bits", "wire_dtype", "bucket_cap_mb"),
)
_BFLOAT16 = ("bf16", "bfloat16", "torch.bfloat16")
_FLOAT16 = ("fp16", "float16", "torch.float16", "half")
_FLOAT32 = ("fp32", "float32", "torch.float32", "float")
_OFFLOAD = "zero_optimization.offload_optimizer"
_Feature = tuple[str, str, Callable[[Any], bool], str]
"""What it is called, where it stands, whether it is on, and why not."""
_REFUSED: tuple[_Feature, ...] = (
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
        "gradients that pass its own all-to-all have never been tested. Leave it out",
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
        "DeepSpeed's converter knows only Adam's states. Leave it out",
    ),
    (
        "NVMe offload of the optimizer",
        f"{_OFFLOAD}.device",
        lambda device: device == "nvme",
        # Tried with libaio: steps equal those of CPU offload bit for bit. AdamW loses its state
        # likewise: python -m tests.zero.nvme_fault.
        "steps are right, but load_checkpoint of DeepSpeed 0.19 reads only its swap files, and "
        "Flora's state would be lost. Offload to the CPU",
    ),
    (
        "NVMe offload of parameters",
        "zero_optimization.offload_param.device",
        lambda device: device == "nvme",
        # Tried with libaio: steps equal those without it bit for bit. Loading ends in
        # AttributeError in stage3.py's _rigid_load_state_dict, with AdamW too.
        "steps are right, but load_checkpoint of DeepSpeed 0.19 fails on parameters that are on "
        "disk. Offload to the CPU",
    ),
)
_REFUSED_WITH_SKETCHES: tuple[_Feature, ...] = (
    (
        "compute_grad_norm off and compressed gradients",
        "zero_optimization.compute_grad_norm",
        lambda is_on: not is_on,
        "the norm is where NaN and inf in sketches are found. Leave it out",
    ),
    (
        "ignore_unused_parameters off and compressed gradients",
        "zero_optimization.ignore_unused_parameters",
        lambda is_on: not is_on,
        "DeepSpeed would take sketched parameters for unused ones. Leave it out",
    ),
    (
        "gradient_predivide_factor and compressed gradients",
        "gradient_predivide_factor",
        lambda factor: factor != 1,
        "sketches are summed in float32 and divided once. Leave it out",
    ),
    (
        "torch_autocast in float16 and compressed gradients",
        "torch_autocast",
        lambda block: bool(block.get("enabled")) and block.get("dtype") in _FLOAT16,
        "its GradScaler would not see sketches. Set its dtype to bfloat16",
    ),
)


def check_features(config: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would compute wrong with Flora, or fail at without a clear reason.

    Raises:
        ValueError: such a feature is on.
    """
    _refuse_on(config, _REFUSED)


def _refuse_on(config: Mapping[str, Any], features: Sequence[_Feature]) -> None:
    for name, path, is_on, why in features:
        value = _value(config, path)
        if value is not None and is_on(value):
            raise refusal(name, why)


def _value(config: Mapping[str, Any], path: str) -> Any:
    """What stands under keys joined by dots; None if nothing does."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def refusal(feature: str, why: str) -> ValueError:
    """The error for a feature; ``why`` ends with a remedy."""
    return ValueError(f"Flora under DeepSpeed does not work with {feature}: {why}.")


def check_flora_block(config: Mapping[str, Any]) -> None:
    """Refuse a "flora" block that cannot be followed, or that the rest of the config contradicts.

    Raises:
        ValueError: an unknown key or value, with the nearest known one; a feature of DeepSpeed that
            would compute something wrong of sketched gradients.
    """
    request = gradient_request(config)
    if request.gradients != LEVELS[0]:
        _refuse_on(config, _REFUSED_WITH_SKETCHES)
        _check_precision(config)


def gradient_request(config: Mapping[str, Any]) -> SketchRequest:
    """What the "flora" block asks for.

    Raises:
        ValueError: an unknown key or value, with the nearest known one.
    """
    for key in config:
        if key != "flora" and key.lower() == "flora":
            raise ValueError(
                f'the config\'s block of Flora is called "flora"; got {key!r}, which DeepSpeed '
                "would ignore. Rename it."
            )
    block = config.get("flora", {})
    _check_keys("flora", block, _GRADIENTS)
    request = SketchRequest(
        gradients=block.get("gradients", LEVELS[0]),
        gradient_rank=block.get("gradient_rank"),
        gradient_bits=block.get("gradient_bits"),
        wire_bits=block.get("wire_bits"),
        wire_dtype=block.get("wire_dtype", "float32"),
        bucket_cap_mb=block.get("bucket_cap_mb"),
    )
    if request.gradients == "sharded":
        raise ValueError(
            '"flora"."gradients" cannot be "sharded" under ZeRO: DeepSpeed keeps shards of full '
            'gradients in buffers of its own, so nothing would be saved. Write "compressed".'
        )
    _check_value("gradients", request.gradients, _AVAILABLE)
    _check_value("wire_dtype", request.wire_dtype, tuple(WIRE_DTYPES))
    rank = request.gradient_rank
    if rank is not None and not (type(rank) is int and rank >= 1):
        raise ValueError(
            f'"flora"."gradient_rank" must be a whole number of at least 1; got {rank!r}. Write '
            "1 or more, or leave it out for the groups' rank."
        )
    unused = [key for key in _GRADIENTS[1:] if key in block]
    if request.gradients == LEVELS[0] and unused:
        raise ValueError(
            f'"flora".{unused[0]!r} says how gradients are compressed; "gradients" is '
            f'{request.gradients!r}. Write "compressed", or leave {unused[0]!r} out.'
        )
    if request.gradients != LEVELS[0]:
        request.check()
    return request


def _check_value(key: str, value: Any, known: Sequence[str]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Write {known[0]!r}."
    raise ValueError(f'"flora".{key!r} must be one of {", ".join(known)}; got {value!r}. {hint}')


def _check_precision(config: Mapping[str, Any]) -> None:
    """Refuse stages that do something to gradients of low precision before or after anybody."""
    stage = _value(config, "zero_optimization.stage") or 0
    low = next((name for name in ("bf16", "fp16") if _value(config, f"{name}.enabled")), None)
    if stage == 0 and low == "fp16":
        raise refusal(
            "fp16 at stage 0 and compressed gradients",
            "DeepSpeed 0.19 divides gradients by a loss scale that the loss was never multiplied "
            "by, so that clipping sees next to nothing. Use bf16, or stage 1, 2 or 3",
        )
    summed = _value(config, "data_types.grad_accum_dtype")
    own = {"bf16": _BFLOAT16, "fp16": _FLOAT16, None: _FLOAT32}[low]
    if stage == 1 and summed not in {None, *own}:  # with bf16 that is BF16_Optimizer
        raise refusal(
            f"data_types.grad_accum_dtype {summed!r} at stage 1 and compressed gradients",
            "DeepSpeed takes each gradient into buffers of its own before anybody else sees it. "
            "Use stage 2",
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
        ValueError: another type, or a setting that Flora does not have, of a role too.
        TypeError: a block that is no object.
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
    roles = settings.get("roles", {})
    _check_object("optimizer.params.roles", roles)
    for key, own in roles.items():
        _check_keys(f"optimizer.params.roles.{key}", own, _OF_GROUPS)
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
    _check_object(block, given)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise ValueError(f'the block "{block}" has the unknown key {key!r}. {hint}')


def _check_object(block: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f'the block "{block}" must be an object; got {given!r}. Write {{...}}.')
