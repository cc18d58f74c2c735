# SPDX-License-Identifier: Apache-2.0
"""ZeRO's buffers of gradients without room for what is sketched.

DeepSpeed 0.19 has no setting for gradients that never come. At stages 1 and 2 it makes zeros for
them after each backward, a buffer into which all gradients of a part are copied, and a flat copy of
both for the step; at stage 3 a permanent buffer of every partition; and buckets of
``reduce_bucket_size`` elements however few pass through. Here an engine's optimizer gets functions
and buffers in their place that know dense gradients alone. What is sketched has a gradient of no
elements, and the flat tensor that is stepped one zero that claims to be all of them: parts of dense
parameters find theirs in ``FlatPart.apart``. Not with offload, nor with fp32 sums of bf16 gradients
(``data_types.grad_accum_dtype``), whose buffers stay as they are. Private names of 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from flora_dist.core.layouts.flat import FlatPart
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.frameworks.deepspeed.config import TESTED

_PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_NAMES: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: (
        "_get_preflattened_grad_partition",
        "copy_grads_in_partition",
        "get_all_grad_tensors",
        "get_flat_partition",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "params_in_partition",
        "reduce_bucket_size",
        "single_partition_of_fp32_groups",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        _PARTITIONS,
        "_prepare_fp32_grad_for_sub_group",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "reduce_bucket_size",
    ),
}


def names_needed(optimizer: Any) -> tuple[str, ...]:
    """What an engine's optimizer must have."""
    return _NAMES[type(optimizer)] if _can_be_lean(optimizer) else ()


class Lean:
    """The dense gradients of an engine that sketches the others, while it steps."""

    def __init__(self, slots: Sequence[Trainable], sketched: Iterable[Any]) -> None:
        """``slots``: all that trains; ``sketched``: the model's parameters whose gradients are."""
        self._sketched = {id(parameter) for parameter in sketched}
        self._parts = [slot.part for slot in slots if isinstance(slot.part, FlatPart)]
        self._unscaled: list[Tensor] = []
        self._is_asked = False

    def keep(self, flat: Tensor, gradients: Mapping[int, Tensor]) -> Tensor:
        """Hand a flat tensor's dense gradients to the step.

        Args:
            flat: what is stepped.
            gradients: by the identity of the model's parameter; copied.

        Returns:
            What may stand as the flat tensor's gradient: (its size), one number of memory.
        """
        self._is_asked = True
        for part in self._parts:
            found = gradients.get(id(part.span.model))
            if part.flat is flat and found is not None and found.numel():
                own = found[: part.num_elements].to(flat.dtype, copy=True)
                part.apart[part.name] = own
                self._unscaled.append(own)
        return torch.zeros(1, dtype=flat.dtype, device=flat.device).expand(flat.shape)

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply what was handed over since the last call: DeepSpeed scales tensor by tensor.

        Raises:
            RuntimeError: nothing was, so that the step has gradients of another kind.
        """
        if not self._is_asked:
            raise RuntimeError(
                "DeepSpeed's step must take its gradients by the functions that do so in "
                f"{TESTED}; that of {deepspeed.__version__} did not call them. Use DeepSpeed "
                f'{TESTED}, or leave "flora"."gradients" out of the config.'
            )
        self._is_asked = False
        for gradient in self._unscaled:
            gradient.mul_(factor)
        self._unscaled.clear()

    def end(self) -> None:
        """Let go of a step's gradients."""
        self._is_asked = False
        self._unscaled.clear()
        for part in self._parts:
            part.apart.clear()

    def is_sketched(self, parameter: Any) -> bool:
        """Whether a parameter's gradient is."""
        return id(parameter) in self._sketched


def make_lean(
    optimizer: Any, slots: Sequence[Trainable], sketched: Sequence[Any], every: Sequence[Any]
) -> Lean | None:
    """Take the room for sketched gradients out of an engine's buffers.

    Args:
        optimizer: of an engine that has not stepped.
        slots: everything that trains.
        sketched: the model's parameters whose gradients are.
        every: the model's parameters that train.

    Returns:
        None where DeepSpeed's buffers stay: stage 0, offload, fp32 sums.
    """
    if not _can_be_lean(optimizer):
        return None
    lean = Lean(slots, sketched)
    is_third = type(optimizer) is DeepSpeedZeroOptimizer_Stage3
    dense = sum(_numel(p) for p in every if not lean.is_sketched(p))
    # All dense gradients fit in one bucket: none is reduced earlier than it was.
    optimizer.reduce_bucket_size = max(1, min(optimizer.reduce_bucket_size, dense))
    if is_third:
        _make_stage_3_lean(optimizer, lean)
    else:
        _make_stage_1_and_2_lean(optimizer, lean)
    return lean


def _can_be_lean(optimizer: Any) -> bool:
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return not (
            optimizer.cpu_offload
            or any(
                optimizer._use_compact_grad_partition_buffer(index)
                for index in range(len(optimizer.bit16_groups))
            )
        )
    return type(optimizer) is DeepSpeedZeroOptimizer_Stage3 and not optimizer.offload_optimizer


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


# ---- stages 1 and 2


def _make_stage_1_and_2_lean(optimizer: Any, lean: Lean) -> None:
    optimizer.get_all_grad_tensors = _dense_tensors(optimizer, lean)
    optimizer.get_flat_partition = _slices(optimizer, lean)
    optimizer._get_preflattened_grad_partition = _stand_in(optimizer, lean)
    optimizer.copy_grads_in_partition = _into_a_small_buffer(optimizer, lean)


def _dense_tensors(optimizer: Any, lean: Lean) -> Callable[..., list[Tensor]]:
    own = optimizer.get_all_grad_tensors

    def get_all_grad_tensors(tensors: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
        found: list[Tensor] = []
        for tensor in tensors:
            none = lean.is_sketched(tensor)
            found += [tensor.new_empty(0, dtype=dtype)] if none else own([tensor], dtype)
        return found

    return get_all_grad_tensors


def _slices(optimizer: Any, lean: Lean) -> Callable[..., list[Tensor]]:
    """What of each gradient is in this rank's part, in the order of its parameters."""

    def get_flat_partition(
        tensors: Sequence[Any], _: int, size: int, *__: Any, param_group_idx: int, **___: Any
    ) -> list[Tensor]:
        place = dist.get_rank(optimizer.real_dp_process_group[param_group_idx])
        starts = optimizer.grad_start_offset[param_group_idx][place]
        offsets = optimizer.grad_partition_insertion_offset[param_group_idx][place]
        gradients = optimizer.all_grad_tensors[param_group_idx]
        found = []
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if lean.is_sketched(tensor):
                found.append(gradient)
                continue
            key = optimizer.get_param_id(tensor)
            start = int(starts[key])
            count = min(gradient.numel() - start, int(size) - int(offsets[key]))
            found.append(gradient.contiguous().view(-1)[start : start + count])
        return found

    return get_flat_partition


def _stand_in(optimizer: Any, lean: Lean) -> Callable[[int], Tensor]:
    def get_preflattened_grad_partition(index: int) -> Tensor:
        parameters = optimizer.params_in_partition[index]
        # Parameters may be none, where there are more ranks than elements: a list of zeros then.
        pairs = zip(parameters, optimizer.averaged_gradients[index], strict=False)
        flat = optimizer.single_partition_of_fp32_groups[index]
        return lean.keep(flat, {id(p): gradient for p, gradient in pairs})

    return get_preflattened_grad_partition


def _into_a_small_buffer(optimizer: Any, lean: Lean) -> Callable[..., None]:
    own = optimizer.copy_grads_in_partition
    every = [p for parameters in optimizer.params_in_partition for p in parameters]
    dense = sum(p.numel() for p in every if not lean.is_sketched(p))

    def copy_grads_in_partition(parameter: Any, *more: Any) -> None:
        if optimizer.grads_in_partition is None:
            optimizer.grads_in_partition_offset = 0
            optimizer.grads_in_partition = parameter.new_empty(dense, dtype=optimizer.dtype)
        own(parameter, *more)

    return copy_grads_in_partition


# ---- stage 3


def _make_stage_3_lean(optimizer: Any, lean: Lean) -> None:
    _shrink_buffers(optimizer, lean)

    def prepare_fp32_grad_for_sub_group(index: int) -> None:
        pairs = zip(optimizer.fp16_groups[index], optimizer.averaged_gradients[index], strict=True)
        flat = optimizer.fp32_partitioned_groups_flat[index]
        flat.grad = lean.keep(flat, {id(p): gradient for p, gradient in pairs})
        optimizer.averaged_gradients[index] = None

    optimizer._prepare_fp32_grad_for_sub_group = prepare_fp32_grad_for_sub_group


def _shrink_buffers(optimizer: Any, lean: Lean) -> None:
    """Room for partitions of dense gradients, and for one bucket of them."""
    every = [p for group in optimizer.fp16_groups for p in group]
    sizes = [0 if lean.is_sketched(p) else p.partition_numel() for p in every]
    buffer = optimizer.grad_partitions_flat_buffer.new_zeros(sum(sizes))
    optimizer.grad_partitions_flat_buffer = buffer
    partitions = getattr(optimizer, _PARTITIONS)
    for parameter, own in zip(every, buffer.split(sizes), strict=True):
        partitions[parameter.ds_id] = own
    for bucket in optimizer.ipg_buckets.values():
        if isinstance(bucket.buffer, Tensor):
            bucket.buffer = bucket.buffer.new_empty(optimizer.reduce_bucket_size)
