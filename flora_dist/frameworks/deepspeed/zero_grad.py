# SPDX-License-Identifier: Apache-2.0
"""``zero_grad()`` of an engine whose gradients are sketched: everything that came in is dropped.

DeepSpeed's own empties ``.grad``, where ZeRO keeps little: gradients of earlier micro-batches stay
in its buffers, and after a backward that was interrupted also half-filled buckets, whose parameters
it then refuses to reduce again. Private names of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor, nn

from flora_dist.flora import Flora
from flora_dist.frameworks.deepspeed.steps import EngineSketches

_SHARED = (
    "_backward_active_depth",
    "averaged_gradients",
    "ipg_buckets",
    "micro_step_id",
    "params_already_reduced",
    "reset_cpu_buffers",
)
_NAMES: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: (
        *_SHARED,
        "_release_ipg_buffers",
        "all_grad_tensors",
        "extra_large_param_to_reduce",
        "previous_reduced_grads",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        *_SHARED,
        "grad_partitions_flat_buffer",
        "parameter_offload",
    ),
}


def names_needed(optimizer: Any) -> tuple[str, ...]:
    """What an engine's optimizer must have for its buffers to be emptied."""
    return _NAMES.get(type(optimizer), ())


def drop_with_zero_grad(engine: DeepSpeedEngine, flora: Flora, sketched: EngineSketches) -> None:
    """Let every ``zero_grad()`` of an engine drop what came in since the last step.

    That is the engine's, its optimizer's, Flora's, and the module's: users hold all four.
    """
    optimizer: Any = engine.optimizer
    own = optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        if not sketched.is_stepping:
            _empty(optimizer)
            # Left by a backward that raised; stage 3's own fails at them on a CPU.
            for parameter in engine.module.parameters():
                parameter.grad = None
            sketched.gradients.drop()
        own(set_to_none)

    step = engine.step

    def step_of_engine(*arguments: Any, **more: Any) -> Any:
        with sketched.stepping():
            return step(*arguments, **more)

    anything: Any = engine  # mypy takes methods of instances for constants
    optimizer.zero_grad = zero_grad
    anything.step = step_of_engine
    anything.zero_grad = _ZeroGrad(engine, zero_grad)
    anything.module.zero_grad = _ZeroGrad(engine.module, zero_grad)
    of_flora: Any = flora
    # Its own would take away the gradients that CPU offload keeps for good.
    of_flora.zero_grad = zero_grad


class _ZeroGrad:
    """Runs beside a module's own ``zero_grad``. A copy of the module has its own alone."""

    def __init__(self, module: nn.Module, drop: Callable[[], None]) -> None:
        self._module, self._drop = module, drop

    def __call__(self, *arguments: Any, **more: Any) -> None:
        own_zero_grad(self._module)(*arguments, **more)
        self._drop()

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which know nothing of the engine."""
        return own_zero_grad, (self._module,)


def own_zero_grad(module: nn.Module) -> MethodType:
    """The ``zero_grad`` of a module's class."""
    return MethodType(type(module).zero_grad, module)


# ---- DeepSpeed's buffers


@torch.no_grad()
def _empty(optimizer: Any) -> None:
    """Take out of ZeRO's buffers what backward has put there; nothing at stage 0.

    Zeros where a step that follows at once would read: DeepSpeed fails on None.
    """
    if type(optimizer) not in _NAMES:
        return
    if not get_accelerator().resolves_data_dependency():
        get_accelerator().synchronize()  # a reduction may be in flight on another stream
    while optimizer._backward_active_depth:  # left by a backward that raised
        optimizer.exit_backward()
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        _empty_stage_3(optimizer)
    else:
        _empty_stage_1_and_2(optimizer)


def _empty_stage_1_and_2(optimizer: Any) -> None:
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.extra_large_param_to_reduce.clear()
    for taken in optimizer.previous_reduced_grads.values():
        taken.clear()
    optimizer.params_already_reduced[:] = [False] * len(optimizer.params_already_reduced)
    optimizer._release_ipg_buffers()
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer.all_grad_tensors.update(dict.fromkeys(optimizer.all_grad_tensors))
    kept: Iterator[Any] = (group or () for group in optimizer.averaged_gradients.values())
    for gradient in (gradient for group in kept for gradient in group):
        gradient.zero_()
    if optimizer.cpu_offload:
        optimizer._offload_accumulated_param_ids = set()
        _empty_offloaded(optimizer, optimizer.single_partition_of_fp32_groups)


def _empty_stage_3(optimizer: Any) -> None:
    """``averaged_gradients`` are views of the one flat buffer."""
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear_params()
    optimizer.params_already_reduced.update(dict.fromkeys(optimizer.params_already_reduced, False))
    optimizer.grad_partitions_flat_buffer.zero_()
    optimizer.parameter_offload.release_backward_leftovers()
    if optimizer.offload_optimizer:
        optimizer._offload_boundary_param_ids = set()
        _empty_offloaded(optimizer, optimizer.fp32_partitioned_groups_flat)


def _empty_offloaded(optimizer: Any, partitions: list[Tensor]) -> None:
    optimizer.reset_cpu_buffers()
    for partition in partitions:
        if partition.grad is not None:
            partition.grad.zero_()
