# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the phases steps a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.step.batch import AtOnce, Batch, Phases
from flora_dist.core.step.gradient import Gradient, SketchedGradient
from flora_dist.core.step.matrix import MatrixPhases
from flora_dist.core.step.momentum_rules import rule_of
from flora_dist.core.step.vector import VectorPhases
from flora_dist.kernels.at_once import NativeStep
from flora_dist.kernels.gpu.choice import gpu_phases_of, said_on_gpu
from flora_dist.kernels.library import found
from flora_dist.kernels.native import NativePhases
from flora_dist.kernels.native_vector import NativeVectorPhases
from flora_dist.kernels.tables import DTYPES, LARGEST_SKETCH, RULES, beyond_kernels


def phases_of(batch: Batch, gradient: Gradient) -> Phases:
    """Compiled kernels where they cover the batch, else torch's operators.

    ``gradient``: of the first member; the others' are of its kind.
    """
    if batch.device.type == "cuda" and (made := gpu_phases_of(batch, gradient)) is not None:
        return made
    operators = found().operators
    is_vector = batch.geometry.is_vector
    if operators is None or not covers(batch, gradient):
        return VectorPhases(batch) if is_vector else MatrixPhases(batch)
    return NativeVectorPhases(batch, operators) if is_vector else NativePhases(batch, operators)


def at_once_of(phases: Sequence[Phases]) -> AtOnce | None:
    """A step of all these batches by one call, where the kernels cover each of them."""
    native = [each for each in phases if isinstance(each, NativePhases | NativeVectorPhases)]
    if not native or len(native) < len(phases):
        return None
    return NativeStep(native, found().operators)


def covers(batch: Batch, gradient: Gradient) -> bool:
    """Whether there are kernels for this device, rule, these dtypes, strides and sketches."""
    size, rule = batch.geometry, rule_of(batch.config, batch.geometry)
    if rule is not None and type(rule) not in RULES:
        return False
    if not size.is_vector and any(beyond_kernels(batch.config)):
        return False
    if batch.device.type != "cpu" or batch.dtype != torch.float32:
        return False
    if size.rank is not None and size.rank * size.block > LARGEST_SKETCH:
        return False
    if isinstance(gradient, SketchedGradient):
        sketch_ERB = gradient.sketch_ERB
        numbers = sketch_ERB.shape[1] * sketch_ERB.shape[2]
        if sketch_ERB.dtype != torch.float32 or numbers > LARGEST_SKETCH:
            return False
    known = {*DTYPES, torch.uint8}  # octets are a momentum's records
    return all(
        tensor.dtype in known and tensor.is_contiguous() and tensor.device.type == "cpu"
        for member in batch.members
        for tensor in (member.weight, *member.local.values())
    )


def said_of(slots: Sequence[Trainable]) -> str:
    """What steps these parameters, for reports."""
    on_gpu = [slot for slot in slots if slot.tensor.device.type == "cuda"]
    if on_gpu:
        return said_on_gpu(on_gpu)
    known = found()
    left = dict.fromkeys(reason for slot in slots for reason in _beyond(slot))
    beside = f"; {', '.join(left)}: torch's operators" if left else ""
    return known.said + (beside if known.operators is not None else "")


def _beyond(slot: Trainable) -> Iterator[str]:
    """What of a parameter's settings the kernels do without."""
    rule = rule_of(slot.config, slot.geometry)
    if rule is not None and type(rule) not in RULES:
        yield f"momentum={slot.config.momentum!r}"
    if not slot.geometry.is_vector:
        yield from beyond_kernels(slot.config)
