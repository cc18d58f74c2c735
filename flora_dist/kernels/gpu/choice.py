# SPDX-License-Identifier: Apache-2.0
"""Which batches on a GPU are stepped by the Triton kernels, and what a report says of it.

Triton is imported where the first such batch is planned, and not before.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.state.spec import LEVELS
from flora_dist.core.step.batch import Batch, Phases
from flora_dist.core.step.gradient import Gradient, SketchedGradient
from flora_dist.kernels.gpu.cover import (
    LARGEST_RANK,
    are_sizes_covered,
    why_not,
    why_not_of,
)

VARIABLE = "FLORA_DIST_GPU_KERNELS"
"""`triton` asks for the kernels of this folder; unset or `torch`: torch's operators."""
OLDEST = (3, 6)
"""The oldest Triton that the kernels were compiled with."""
REMEDY = "pip install 'flora-dist[gpu]'"


def gpu_phases_of(batch: Batch, gradient: Gradient) -> Phases | None:
    """Kernels for a batch of CUDA tensors that they step rightly here; None: torch's operators.

    Raises:
        RuntimeError: the variable asks for Triton, and there is none.
    """
    if not is_wanted():
        return None
    if reason := without_triton():
        raise RuntimeError(f"{VARIABLE}=triton asks for kernels on CUDA tensors: {reason}")
    if why_not(batch, gradient):
        return None
    # Here, since torch's operators need no trial.
    from flora_dist.kernels.gpu.self_check import is_sound

    return make_phases(batch, gradient) if is_sound(batch, gradient, make_phases) else None


def is_wanted() -> bool:
    """Asked for: no GPU has run the kernels yet, and a training run is no place to find out."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in {"", "torch", "triton"}:
        raise ValueError(
            f"{VARIABLE} must be torch, triton or unset; got {asked!r}. Correct it, or unset it."
        )
    return asked == "triton"


def make_phases(batch: Batch, gradient: Gradient) -> Phases:
    """The kernels of a batch that they cover, for gradients of this kind."""
    # Here, since they import Triton.
    from flora_dist.kernels.gpu.phases import GpuPhases
    from flora_dist.kernels.gpu.vector_phases import GpuVectorPhases

    if batch.geometry.is_vector:
        return GpuVectorPhases(batch)
    block = gradient.sketch_ERB.shape[2] if isinstance(gradient, SketchedGradient) else 0
    return GpuPhases(batch, block)


@functools.cache
def without_triton() -> str:
    """Why there are no kernels for GPUs; empty where there are."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return f"Triton is not installed. {REMEDY}"
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < OLDEST:
        return f"Triton must be at least 3.6; {found} is installed. {REMEDY}"
    return ""


def said_on_gpu(slots: Sequence[Trainable]) -> str:
    """What steps these parameters, for reports."""
    if not is_wanted():
        return f"torch; {VARIABLE}=triton asks for kernels, which no GPU has run yet"
    if reason := without_triton():
        return f"torch: {reason}"
    left = Counter(filter(None, map(_why_not_slot, slots)))
    name = f"triton {version('triton')}"
    if not left:
        return name
    return f"{name}; torch for {', '.join(_counted(left))}"


def _counted(left: Counter[str]) -> Iterator[str]:
    for reason, count in left.items():
        yield f"{reason} ({count} {'parameter' if count == 1 else 'parameters'})"


def _why_not_slot(slot: Trainable) -> str:
    size = slot.geometry
    # How many numbers stand for a block of a gradient, a slot does not know: as many at the most.
    if slot.level != LEVELS[0] and not are_sizes_covered(size.block, size.block):
        return f"sketched gradients where over {LARGEST_RANK} of {size.block} numbers are kept"
    return why_not_of(size, slot.config, slot.tensor.dtype)
