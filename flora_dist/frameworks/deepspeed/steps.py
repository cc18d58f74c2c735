# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own norm, clipping, loss scale and overflow check, with what is sketched in them.

DeepSpeed knows of no gradient of a sketched parameter. So what its step asks of gradients, the norm
and the scaling, is wrapped on the engine's own objects: |C| enters the norm, C is scaled by what
full gradients are scaled by, and what a step leaves, made or skipped, is dropped. Read in 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from flora_dist.core.parameters.norms import global_norm
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.frameworks.deepspeed.config import TESTED
from flora_dist.frameworks.deepspeed.lean import Lean
from flora_dist.gradients.cycle import Gradients


class EngineSketches:
    """The sketched gradients of an engine, as its step asks for them."""

    def __init__(self, gradients: Gradients, slots: Sequence[Trainable]) -> None:
        """``slots``: of the gradients' parameters."""
        self.gradients = gradients
        self._slots = [slot for slot in slots if slot.part.name in gradients.flows]
        self.is_stepping = False
        """Whether DeepSpeed is in a step: what it clears there is its own business."""
        self.begin()

    def begin(self) -> None:
        """Nothing is known of the coming step."""
        self._norm: Tensor | None = None
        self._is_scaled = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """While a step is made; steps of an engine hold those of its optimizer."""
        before, self.is_stepping = self.is_stepping, True
        try:
            yield
        finally:
            self.is_stepping = before

    @torch.no_grad()
    def norm(self) -> Tensor:
        """sqrt(sum |C|^2) over all ranks, (), before any scaling; all ranks must ask."""
        if self._norm is None:
            self.gradients.reduce()
            means = [self.gradients.mean_of(slot.part.name) for slot in self._slots]
            self._norm = global_norm(self._slots, means)
        return self._norm

    @torch.no_grad()
    def scale_(self, factor: Tensor | float) -> None:
        """Multiply all C, at the first call of a step: DeepSpeed scales group after group."""
        if self._norm is None:
            raise _another_version()
        if not self._is_scaled:
            self.gradients.scale_(factor)
        self._is_scaled = True

    def end(self, optimizer: Any) -> None:
        """Forget what a step of ``optimizer`` was made of, or would have been.

        Raises:
            RuntimeError: it was made without asking for norm and scale.
        """
        self.gradients.forget()
        if not optimizer.overflow and (self._norm is None or not self._is_scaled):
            raise _another_version()


def _another_version() -> RuntimeError:
    return RuntimeError(
        "DeepSpeed's step must compute the norm of its gradients and then scale them, by the "
        f"functions that do so in DeepSpeed {TESTED}; DeepSpeed {deepspeed.__version__} did not "
        f'call them. Use DeepSpeed {TESTED}, or leave "flora"."gradients" out of the config.'
    )


def join(optimizer: Any, sketched: EngineSketches, lean: Lean | None) -> None:
    """Put sketched gradients into the steps of an engine's optimizer.

    ``lean``: where its dense gradients are, unless in DeepSpeed's own buffers.
    """
    if type(optimizer) is FP16_UnfusedOptimizer:
        _join_copies(optimizer, sketched)
    else:
        _join_norm(optimizer, sketched)
        _join_scale(optimizer, sketched, lean)
    step = optimizer.step

    def step_and_forget(*arguments: Any, **more: Any) -> Any:
        sketched.begin()
        with sketched.stepping():
            result = step(*arguments, **more)
        if lean is not None:
            lean.end()
        sketched.end(optimizer)
        return result

    optimizer.step = step_and_forget


def _join_norm(optimizer: Any, sketched: EngineSketches) -> None:
    """ZeRO: the norm is also its check for NaN and inf, and the same on all ranks."""
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        norms_of_groups = optimizer._get_norm_groups

        def get_norm_groups() -> list[Tensor]:
            norms: list[Tensor] = norms_of_groups()
            return [*norms, sketched.norm().to(norms[0])]

        optimizer._get_norm_groups = get_norm_groups
        return
    norm_of_all = optimizer.scaled_global_norm

    def scaled_global_norm(*arguments: Any) -> Any:
        norm = norm_of_all(*arguments)
        return combine_grad_norm_groups([norm, sketched.norm().to(norm)])

    optimizer.scaled_global_norm = scaled_global_norm


def _join_scale(optimizer: Any, sketched: EngineSketches, lean: Lean | None) -> None:
    unscale_and_clip = optimizer.unscale_and_clip_grads

    def unscale_and_clip_grads(gradients: Any, norm: Tensor) -> None:
        factor = _factor(optimizer, norm)
        sketched.scale_(factor)
        if lean is None:
            unscale_and_clip(gradients, norm)
        else:
            lean.scale_(factor)

    optimizer.unscale_and_clip_grads = unscale_and_clip_grads


def _factor(optimizer: Any, norm: Tensor) -> Tensor | float:
    """What ZeRO's ``unscale_and_clip_grads`` multiplies by, stages 1 to 3 alike."""
    scale: Tensor | float = optimizer.loss_scale
    if optimizer.clip_grad > 0.0:
        # |G| / clip with the loss scale out of it; 1 where that is below
        excess = ((norm / scale) + 1e-6) / optimizer.clip_grad
        scale = excess.clamp(min=1.0) * scale
    return 1.0 / scale


def _join_copies(optimizer: FP16_UnfusedOptimizer, sketched: EngineSketches) -> None:
    """Stage 0 in low precision: nothing is called for the norm, which is added where it is used."""
    check, unscale_and_clip = optimizer.overflow_checker.check, optimizer.unscale_and_clip_grads

    def check_also(*arguments: Any) -> bool:
        return bool(check(*arguments)) or not bool(sketched.norm().isfinite())

    def unscale_and_clip_grads(norm: float, *arguments: Any) -> Any:
        # Python's number, as DeepSpeed keeps it; with the loss scale still in it
        optimizer._global_grad_norm = math.hypot(norm, float(sketched.norm()))
        scale = unscale_and_clip(optimizer._global_grad_norm, *arguments)
        sketched.scale_(1.0 / scale)
        return scale

    optimizer.overflow_checker.check = check_also
    optimizer.unscale_and_clip_grads = unscale_and_clip_grads
