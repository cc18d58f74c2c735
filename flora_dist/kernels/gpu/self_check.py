# SPDX-License-Identifier: Apache-2.0
"""Before the Triton kernels step a batch: whether they do so rightly on this very device.

A small parameter with the batch's settings, of random numbers, takes some steps by the kernels and
by torch's operators. Each kind of batch is tried once in a process. What no such trial can find is
a kernel that reads memory which is not its own: CUDA then fails for the whole process.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.parameters.trainable import make_trainables
from flora_dist.core.records import FULL_BITS, Code
from flora_dist.core.sketch import ops
from flora_dist.core.sketch.matrices import sketch_matrices
from flora_dist.core.sketch.quantise import read_by_torch, round_records
from flora_dist.core.state.settings import TWO_MOMENTS, FloraConfig
from flora_dist.core.state.spec import LEVELS, matrix_sizes
from flora_dist.core.step.batch import Batch, Phases
from flora_dist.core.step.gradient import Gradient, Records, SketchedGradient
from flora_dist.core.step.matrix import MatrixPhases
from flora_dist.core.step.phases import run_step
from flora_dist.core.step.plan import PhasesOf, make_plan
from flora_dist.core.step.vector import VectorPhases
from flora_dist.kernels.gpu.trial_layouts import (
    COLUMNS,
    NAME,
    SPAN,
    WHOLE,
    held,
    layout_of,
    local_shape,
    tiles_held,
)

MOST_ROWS = 40
"""Of the parameter that is tried: more than a program of any kernel takes at once."""
STEPS, KAPPA = 3, 2
"""The second one begins a window of sketches."""
LR, DECAY = 1e-2, 0.1
LARGEST_DISTANCE = 2e-5
"""Of the movement: sums of float32 taken in another order part by some 1e-6 of what is summed."""
LARGEST_ROUNDED = 2.0**-4
"""The same in 16 bits, where a number may be rounded to the other side: a step of the grid is up to
2^-7 of a number, and numbers are some times the movement."""
FURTHER_THAN_TORCH = 8.0
"""Rules of two moments divide a sketched number by the root of its mean square, so that roundings
grow where it is all but zero. There the kernels may be so many times as far from torch's operators
as these are from a run in float64."""
KERNELS = {
    "row": "measure",
    "column": "settle",
    "norm": "scale",
    "start": "scale",
    "second": "vector",
    "momentum": "finish",
    "weight": "finish",
}
"""Which kernel writes what, in the order in which they run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is tried."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    cut: str
    """What of it is here, as ``trial_layouts.py`` names it."""
    config: FloraConfig
    maximize: bool
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    sketch: Code | None
    """Of gradients that are known by sketches; ``FULL_BITS``: in float32."""
    sketch_block: int
    device: torch.device


def is_sound(batch: Batch, gradient: Gradient, make: PhasesOf) -> bool:
    """Whether kernels may step a batch; a warning names the one that may not, and why.

    ``make``: the kernels of a batch.
    """
    return not any(_fault(each, make) for each in _trials(_trial_of(batch, gradient)))


@functools.cache
def _fault(trial: Trial, make: PhasesOf) -> str:
    """What is wrong, told once for each kind of batch; empty if nothing is."""
    try:
        what = fault(trial, make)
    except Exception as error:  # whatever a compiler, a driver or a launch raises
        what = f"do not run: {type(error).__name__}: {error}"
    if what:
        warnings.warn(
            f"the Triton kernels must step as torch's operators do; on {trial.device} with "
            f"{trial.dtype} weights and momentum={trial.config.momentum!r} they {what}. Torch's "
            "operators step such parameters. Unset FLORA_DIST_GPU_KERNELS, and report this with "
            "the names of the GPU and of Triton's version.",
            RuntimeWarning,
            stacklevel=2,
        )
    return what


def fault(trial: Trial, make: PhasesOf) -> str:
    """The first kernel that parts from torch's operators, and how far; empty if none does."""
    start, expected = _run(trial, _by_torch)
    _, found = _run(trial, make)
    for name, kernel in KERNELS.items():
        if name not in expected:
            continue
        own, other = (_numbers(side[name], trial).double() for side in (found, expected))
        moved = (other - start.double()).norm() if name == "weight" else other.norm()
        distance = ((own - other).norm() / moved).item()
        is_rounded = torch.float32 not in {trial.dtype, found[name].dtype}
        largest = LARGEST_ROUNDED if is_rounded else _largest(trial)
        if not distance <= largest and not distance <= _grown(trial, name, other) / moved:
            return f"part in {kernel} ({name}) by {distance:.1e} of the movement"
    return ""


def _grown(trial: Trial, name: str, by_torch: Tensor) -> float:
    """How far kernels may be from torch's operators where roundings grow; 0 where they do not."""
    if trial.config.momentum not in TWO_MOMENTS or trial.dtype != torch.float32:
        return 0.0
    _, exact = _run(replace(trial, dtype=torch.float64), _by_torch)
    own: float = (by_torch - exact[name].double()).norm().item()
    return FURTHER_THAN_TORCH * own


def _numbers(kept: Tensor, trial: Trial) -> Tensor:
    """What is kept, or what records of a momentum stand for."""
    if kept.dtype != torch.uint8:
        return kept
    assert trial.config.rank is not None
    code = Code(bits=trial.config.sketch_bits, numbers=int(trial.config.rank))
    return read_by_torch(kept, code, torch.float32)


def _largest(trial: Trial) -> float:
    """Of what is kept in float32: a momentum in fewer bits rounds what follows from it."""
    is_sketched = trial.config.rank is not None
    is_rounded = trial.config.sketch_bits < 32 if is_sketched else _is_low(trial.config)
    return LARGEST_ROUNDED if is_rounded else LARGEST_DISTANCE


def _is_low(config: FloraConfig) -> bool:
    return config.state_dtype == "bfloat16"


def _trial_of(batch: Batch, gradient: Gradient) -> Trial:
    first, size = batch.members[0], batch.geometry
    shape: tuple[int, ...] = (min(size.num_columns, MOST_ROWS),)
    if not size.is_vector:
        matrices = () if size.num_matrices == 1 else (2,)
        shape = (*matrices, min(size.num_rows, MOST_ROWS), size.num_columns)
    # As they came out for the whole shape; they depend on the rows too.
    cut: dict[str, Any] = {"rank": size.rank}
    if size.rank is not None:
        cut |= {"block": size.block, "compress": "halving"}
    elif batch.config.state_dtype is None:  # so that the two trials of a dense batch are one
        cut["state_dtype"] = "float32"
    code: Code | None = None
    block, dtype = 0, first.weight.dtype if gradient is None else torch.float32
    if isinstance(gradient, Tensor):
        dtype = gradient.dtype
    elif isinstance(gradient, SketchedGradient):
        rank, block = gradient.sketch_ERB.shape[1:]
        records = [tile for tile in gradient.tiles if isinstance(tile, Records)]
        code = records[0].code if records else Code(bits=FULL_BITS, numbers=rank)
    return Trial(
        shape=shape,
        cut=_cut_of(batch),
        config=replace(batch.config, kappa=KAPPA, strict=False, **cut),
        maximize=batch.sign < 0,
        dtype=first.weight.dtype,
        gradient_dtype=dtype,
        sketch=code,
        sketch_block=block,
        device=batch.device,
    )


def _cut_of(batch: Batch) -> str:
    cuts = batch.members[0].cuts
    if batch.geometry.is_vector or not cuts.rows_anywhere:
        return WHOLE
    return SPAN if cuts.are_few else COLUMNS


def _trials(trial: Trial) -> Iterable[Trial]:
    """In float32, where nothing but the order of sums may differ; then as the batch is."""
    config = trial.config
    # As many numbers as a block has elements are no sketch in float32.
    if config.rank is None or config.rank != config.block:
        config = replace(config, state_dtype="float32", state_bits=None)
    full = replace(trial, config=config, dtype=torch.float32, gradient_dtype=torch.float32)
    return dict.fromkeys([full, trial])


def _by_torch(batch: Batch, gradient: Gradient) -> Phases:
    del gradient
    return VectorPhases(batch) if batch.geometry.is_vector else MatrixPhases(batch)


def given_as(gradient: Tensor, trial: Trial) -> Gradient:
    """What is here of a gradient, or of its sketches, times a factor where these are records."""
    code, shape = trial.sketch, matrix_sizes(trial.shape)
    tiles = tiles_held(trial.cut, trial.shape)
    if code is None:
        return held(gradient.view(shape), tiles).view(local_shape(trial.cut, trial.shape))
    sketch_ERB = sketch_matrices(
        trial.config.sketch,
        keys=range(shape[0]),
        rank=code.numbers,
        block=trial.sketch_block,
        dtype=torch.float32,
        device=trial.device,
    )
    whole = ops.compress(gradient.view(shape), sketch_ERB)
    boxes = [(t.matrices, t.rows, t.blocks(trial.sketch_block)) for t in tiles]
    parts = [whole[slice(*e), slice(*n), slice(*k)].contiguous() for e, n, k in boxes]
    return SketchedGradient(
        tiles=tuple(_kept(part, code) for part in parts), sketch_ERB=sketch_ERB, first_matrix=0
    )


def _kept(numbers: Tensor, code: Code) -> Tensor | Records:
    """Numbers as they are, or records of them, to be multiplied by a half."""
    if code.bits == FULL_BITS:
        return numbers
    middle = torch.full(numbers.shape, 1 << 15, dtype=torch.int32, device=numbers.device)
    octets = round_records(numbers, middle, code)
    factor = torch.full((), 0.5, device=numbers.device)
    return Records(octets=octets, code=code, dtype=torch.float32, factor=factor)


def _run(trial: Trial, phases_of: PhasesOf) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight before, and weight and state after some steps; the same numbers for all."""
    draw = torch.Generator().manual_seed(0)

    def random(dtype: torch.dtype) -> Tensor:
        return torch.randn(trial.shape, generator=draw).to(device=trial.device, dtype=dtype)

    whole = 0.02 * random(trial.dtype).view(matrix_sizes(trial.shape))
    weight = held(whole, tiles_held(trial.cut, trial.shape))
    weight = weight.view(local_shape(trial.cut, trial.shape))
    start = weight.clone()
    group = {
        "params": [weight],
        "param_names": [NAME],
        "lr": LR,
        "weight_decay": DECAY,
        "maximize": trial.maximize,
    }
    layout = layout_of(trial.cut, weight, trial.shape)
    (slot,) = make_trainables([group], {}, [layout], LEVELS[0])
    state: dict[str, Any] = {}
    slot.configure(trial.config, state)
    slot.create_state(state)
    for _ in range(STEPS):
        gradients = [given_as(random(trial.gradient_dtype), trial)]
        plan = make_plan([slot.member(state)], gradients, phases_of, lambda _: None)
        run_step(plan, gradients, may_only_create_state=False)
    kept = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return start, {"weight": weight, **kept}
