# SPDX-License-Identifier: Apache-2.0
"""ZeRO without fp32 weights: what Flora steps is what the model computes with.

``"bf16": {"enabled": true, "bf16_master_weights_and_grads": true}`` has DeepSpeed 0.19 keep the
weights that are stepped in bfloat16, but in a second copy: 2 bytes of each element that a rank
steps, for nothing. ``share_weights`` lets both be one. Small updates get through because Flora
rounds stochastically; an optimizer that rounds to the nearest number would lose them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from flora_dist.frameworks.deepspeed.config import ALONE, TESTED, refusal

_STATES = "bf16_optimizer_states"
_NAMES: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: (
        "_link_all_hp_params",
        "parallel_partitioned_bit16_groups",
        "single_partition_of_fp32_groups",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
    ),
}


def with_states(config: Mapping[str, Any]) -> dict[str, Any]:
    """The "bf16" block that DeepSpeed needs for weights in bfloat16 alone; empty for others.

    Without ``bf16_optimizer_states`` it asks for its own CPU Adam; of Flora's state nothing
    depends on it.

    Raises:
        ValueError: Flora cannot follow: a stage or an offload that DeepSpeed lacks.
    """
    block = config.get("bf16")
    if not isinstance(block, Mapping) or not block.get(ALONE):
        return {}
    zero = config.get("zero_optimization", {})
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if offload != "none":
        raise refusal(
            f"{ALONE} and offload of the optimizer",
            f"DeepSpeed 0.19 then takes no optimizer but its own. Leave out {ALONE} or "
            "offload_optimizer",
        )
    if not block.get("enabled") or zero.get("stage", 0) == 0:
        raise refusal(
            f"{ALONE} outside of bf16 and ZeRO 1 to 3",
            'DeepSpeed has it there alone. Set "bf16": {"enabled": true} and a stage',
        )
    return {"bf16": {**block, _STATES: True}}


@torch.no_grad()
def share_weights(optimizer: Any) -> None:
    """Make one of the two copies of weights that an engine holds in one precision.

    Nothing for fp32 masters, for offload, and for optimizers that are not ZeRO's.

    Raises:
        RuntimeError: this version of DeepSpeed keeps its weights in another way.
    """
    names = _NAMES.get(type(optimizer))
    if names is None or not getattr(optimizer, "bf16_master_weights_and_gradients", False):
        return
    for name in names:
        if not hasattr(optimizer, name):
            raise _another_version(f"has no {name}")
    for master, weights in _pairs(optimizer):
        if master.shape != weights.shape or not _same_bits(master.detach(), weights):
            raise _another_version("keeps other weights in its masters than in the model")
        master.data = weights
    if type(optimizer) is DeepSpeedZeroOptimizer:
        # DeepSpeed's own views, for safe_get_full_fp32_param, would keep the old copy.
        optimizer._link_all_hp_params()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Not by value: what pads the last partition is whatever memory held, NaN among it."""
    return one.dtype == other.dtype and one.view(torch.uint8).equal(other.view(torch.uint8))


def _pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What is stepped, and the same elements as the model has them."""
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        flat = zip(
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups_flat,
            strict=True,
        )
        yield from flat
        return
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        place = dist.get_rank(optimizer.real_dp_process_group[index])
        yield master, optimizer.parallel_partitioned_bit16_groups[index][place].detach()


def _another_version(what: str) -> RuntimeError:
    return RuntimeError(
        f"weights in bfloat16 alone need DeepSpeed's partitions of {TESTED}; "
        f"{deepspeed.__version__} {what}. Use DeepSpeed {TESTED}, or leave {ALONE} out."
    )
