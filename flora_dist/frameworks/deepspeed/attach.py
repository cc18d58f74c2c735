# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: where ZeRO keeps each parameter, and what of DeepSpeed would be run wrong.

Knows the names of DeepSpeed's engines and partitions. Read in 0.19.8; ``attach`` proves on every
engine that the map built from them still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from flora_dist.core.comm.groups import GroupReducer
from flora_dist.core.layouts.flat import FlatLayout, Span, cut_each, cut_line
from flora_dist.core.layouts.replicated import NamedLayout
from flora_dist.core.sketch.keys import canonical_name
from flora_dist.flora import Flora
from flora_dist.frameworks.deepspeed.config import check_features, check_flora_block, refusal
from flora_dist.frameworks.deepspeed.gather import gathering_in_pieces
from flora_dist.frameworks.deepspeed.gradients import check_compressible, sketch_gradients
from flora_dist.frameworks.deepspeed.masters import share_weights
from flora_dist.frameworks.spans import Partition, check_partitions

_attached: WeakKeyDictionary[Flora, ref[DeepSpeedEngine]] = WeakKeyDictionary()


def attach(engine: DeepSpeedEngine) -> Flora:
    """Tell an engine's Flora where ZeRO keeps each parameter; a second call does nothing.

    For engines that Accelerate, the Hugging Face Trainer or your own code built; call it on every
    rank, before the first step. ``initialize`` calls it itself. The "flora" block of the engine's
    config says what is compressed of the gradients.

    Returns:
        The engine's Flora, for ``report()``.

    Raises:
        TypeError: the engine's optimizer is not Flora.
        ValueError: a feature that would be computed wrong, a "flora" block that cannot be followed,
            an engine that has stepped already, or ranks that differ.
        RuntimeError: this version of DeepSpeed lays parameters out in another way.
    """
    optimizer = engine.optimizer
    flora = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(flora, Flora):
        raise TypeError(
            "attach needs an engine whose optimizer is Flora; this one has "
            f"{type(flora).__name__}. Pass optimizer=Flora(...) or use "
            "flora_dist.deepspeed.initialize."
        )
    known = _attached.get(flora)
    if known is not None and known() is engine:
        return flora
    _refuse_features(engine)
    share_weights(optimizer)
    begin_gathering = gathering_in_pieces(optimizer)
    # Of tied names the first, as a plain run's Flora(model.named_parameters()) has it.
    names = {id(p): canonical_name(name) for name, p in engine.module.named_parameters()}
    if isinstance(optimizer, Flora):
        flora.attach_layout(NamedLayout(_named(optimizer.param_groups, names)))
    elif type(optimizer) is FP16_UnfusedOptimizer:
        flora.attach_layout(NamedLayout(_named_copies(optimizer, names)))
    else:
        _attach_partitions(flora, optimizer, _partitions_of(optimizer, names))
    sketch_gradients(engine, flora, names)
    flora.check_consistency()
    # Not at the first step: stages 1 and 2 hide all groups but one from a step.
    flora.announce()
    begin_gathering()
    _attached[flora] = ref(engine)
    return flora


def _attach_partitions(flora: Flora, optimizer: Any, partitions: list[Partition]) -> None:
    check_partitions(partitions, framework=f"DeepSpeed {deepspeed.__version__}", tested="0.19.8")
    layout = FlatLayout()
    tensors: list[list[Tensor]] = [[] for _ in optimizer.optimizer.param_groups]
    for partition in partitions:
        group = partition.process_group
        reducer = GroupReducer(group=group) if dist.get_world_size(group) > 1 else None
        layout.add(partition.flat, partition.spans, rank=dist.get_rank(group), reducer=reducer)
        tensors[partition.param_group].append(partition.flat)
    flora.attach_layout(layout, tensors)


# ---- what would be computed wrong


def _refuse_features(engine: DeepSpeedEngine) -> None:
    check_flora_block(engine.config)
    check_features(engine.config)
    for name, is_on, why in (
        (
            "MoE layers",
            engine.has_moe_layers,
            "expert groups divide gradients in another way. Use FSDP2 for experts",
        ),
        ("pipelines", engine.pipeline_parallelism, "pipeline stages do not share a step. Use ZeRO"),
        (
            "tensor parallelism of an mpu",
            _tensor_parallel_size(engine.mpu) > 1,
            "each rank's columns or rows would pass for a whole matrix. Use FSDP2 with tensor "
            "parallelism",
        ),
    ):
        if is_on:
            raise refusal(name, why)
    check_compressible(engine)


def _tensor_parallel_size(mpu: Any) -> int:
    """By the names that Megatron's model parallel units have had."""
    for name in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1


# ---- where parameters are


Named = tuple[str, Tensor, Tensor]
"""A name, the tensor that is stepped, and the model's parameter, which may be frozen on the way."""


def _named(groups: Sequence[dict[str, Any]], names: dict[int, str]) -> Iterator[Named]:
    for group in groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter, parameter


def _named_copies(optimizer: FP16_UnfusedOptimizer, names: dict[int, str]) -> Iterator[Named]:
    """Stage 0 in low precision steps whole fp32 copies."""
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    for parameters, copies in groups:
        for parameter, copy in zip(parameters, copies, strict=True):
            yield names[id(parameter)], copy, parameter


def _partitions_of(optimizer: Any, names: dict[int, str]) -> list[Partition]:
    # Exact classes: a subclass (ZenFlow, SuperOffload) may hold its partitions otherwise.
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return list(_partitions_of_stage_1_and_2(optimizer, names))
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return list(_partitions_of_stage_3(optimizer, names))
    if type(optimizer) is BF16_Optimizer:
        return list(_partitions_of_bf16(optimizer, names))
    raise ValueError(
        "Flora knows the partitions of ZeRO stages 1, 2 and 3; this engine has "
        f"{type(optimizer).__module__}.{type(optimizer).__name__}. Use one of these stages."
    )


def _partitions_of_stage_1_and_2(
    optimizer: DeepSpeedZeroOptimizer, names: dict[int, str]
) -> Iterator[Partition]:
    # Not `_hp_mapping`: it keeps the order before round_robin_gradients and points elsewhere.
    for index, parameters in enumerate(optimizer.round_robin_bit16_groups):
        group = optimizer.real_dp_process_group[index]
        yield Partition(
            flat=optimizer.single_partition_of_fp32_groups[index],
            param_group=index,
            process_group=group,
            spans=_of_model(
                parameters,
                cut_line(
                    [(names[id(p)], tuple(p.shape)) for p in parameters],
                    offsets=optimizer.round_robin_bit16_offsets[index],
                    size=int(optimizer.partition_size[index]),
                    rank=dist.get_rank(group),
                    world_size=dist.get_world_size(group),
                ),
            ),
            weights=[_whole(p) for p in parameters],
        )


def _partitions_of_bf16(optimizer: BF16_Optimizer, names: dict[int, str]) -> Iterator[Partition]:
    """Stage 1 in bf16 with fp32 accumulation."""
    for index, parameters in enumerate(optimizer.bf16_groups):
        group = optimizer.real_dp_process_group[index]
        sizes = [p.numel() for p in parameters]
        flat = optimizer.fp32_groups_flat_partition[index]
        yield Partition(
            flat=flat,
            param_group=index,
            process_group=group,
            spans=_of_model(
                parameters,
                cut_line(
                    [(names[id(p)], tuple(p.shape)) for p in parameters],
                    offsets=[sum(sizes[:i]) for i in range(len(sizes))],
                    size=flat.numel(),
                    rank=dist.get_rank(group),
                    world_size=dist.get_world_size(group),
                ),
            ),
            weights=[_whole(p) for p in parameters],
        )


def _partitions_of_stage_3(
    optimizer: DeepSpeedZeroOptimizer_Stage3, names: dict[int, str]
) -> Iterator[Partition]:
    for index, parameters in enumerate(optimizer.fp16_groups):  # sub-groups
        groups = {optimizer._get_param_partition_group(p) for p in parameters}
        if len(groups) != 1:
            raise ValueError(
                "parameters of a sub-group must be partitioned over the same ranks; sub-group "
                f"{index} has {len(groups)} process groups. Put them in separate parameter groups."
            )
        group = groups.pop()
        yield Partition(
            flat=optimizer.fp32_partitioned_groups_flat[index],
            param_group=optimizer.sub_group_to_group_id[index],
            process_group=group,
            spans=_of_model(
                parameters,
                cut_each(
                    [(names[id(p)], tuple(p.ds_shape)) for p in parameters],
                    sizes=[p.partition_numel() for p in parameters],
                    world_size=dist.get_world_size(group),
                ),
            ),
            weights=[_shard(p) for p in parameters],
        )


def _of_model(parameters: Sequence[Tensor], spans: Iterable[Span]) -> tuple[Span, ...]:
    """DeepSpeed steps zeros where a parameter has no gradient; of a frozen one nothing may move."""
    pairs = zip(parameters, spans, strict=True)
    return tuple(replace(span, model=parameter) for parameter, span in pairs)


def _whole(parameter: nn.Parameter) -> Callable[[int, int], Tensor]:
    return lambda start, stop: parameter.detach().reshape(-1)[start:stop]


def _shard(parameter: Any) -> Callable[[int, int], Tensor]:
    return lambda start, stop: parameter.ds_tensor.detach().reshape(-1)[: stop - start]
