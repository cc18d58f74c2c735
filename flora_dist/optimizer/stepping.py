# SPDX-License-Identifier: Apache-2.0
"""One step over all parameters: measure, sum, couple, sum, tally, sum, finish.

Three messages at most per group of ranks, whatever the number of parameters; most layouts and rules
have nothing to say in the second and third.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flora_dist.comm.groups import any_process
from flora_dist.comm.message import sum_terms
from flora_dist.optim.gradient import SketchedGradient
from flora_dist.optim.job import Job, Update
from flora_dist.optim.matrix import MatrixUpdate
from flora_dist.optim.part import Reducer, Terms
from flora_dist.optim.vector import VectorUpdate
from flora_dist.optimizer.slots import Slot

Gradient = Tensor | SketchedGradient | None
"""This rank's elements, their sketches, or nothing."""


def run_step(
    slots: Sequence[Slot],
    gradients: Sequence[Gradient],
    state: Mapping[Tensor, dict[str, Any]],
    *,
    may_only_create_state: bool,
) -> None:
    """Update the parameters of ``slots``, which every rank gives in the same order.

    ``gradients``: of each slot. ``may_only_create_state``: a first step of rate 0 on zeros does
    not count.
    """
    # Without peers a missing gradient is missing everywhere; with peers it takes a place in the
    # message, since another rank may have one.
    pairs = zip(slots, gradients, strict=True)
    jobs = [slot.job(state[slot.tensor], gradient) for slot, gradient in pairs]
    jobs = [job for job in jobs if job.part.reducer is not None or job.gradient is not None]
    updates = [_update_of(job) for job in jobs]
    totals = _sum(updates, [update.measure() for update in updates])
    if any(job.config.skip_nonfinite for job in jobs) and not _are_finite(updates):
        return
    if may_only_create_state and _only_creates_state(updates):
        return
    present = _presence(updates, totals)
    totals = [total for total, here in zip(totals, present, strict=True) if here]
    updates = [update for update, here in zip(updates, present, strict=True) if here]
    coupled = [update.couple(total) for update, total in zip(updates, totals, strict=True)]
    totals = _sum(updates, coupled)
    tallied = [update.tally(total) for update, total in zip(updates, totals, strict=True)]
    totals = _sum(updates, tallied)
    for update, total in zip(updates, totals, strict=True):
        update.finish(total)


def _update_of(job: Job) -> Update:
    return VectorUpdate(job) if job.geometry.is_vector else MatrixUpdate(job)


def _sum(updates: Sequence[Update], terms: Sequence[Terms]) -> list[Terms]:
    """Sum each parameter's terms over its ranks, one message per group of ranks."""
    places: dict[Reducer | None, list[int]] = {}
    for index, update in enumerate(updates):
        places.setdefault(update.job.part.reducer, []).append(index)
    totals: list[Terms] = [{} for _ in updates]
    for reducer, indices in places.items():
        cuts = [updates[index].job.cuts for index in indices]
        sums = sum_terms([terms[index] for index in indices], cuts, reducer)
        for index, total in zip(indices, sums, strict=True):
            totals[index] = total
    return totals


def _presence(updates: Sequence[Update], totals: Sequence[Terms]) -> list[bool]:
    """Whether any rank has a gradient; asks the device only where this rank has none."""
    missing = [i for i, update in enumerate(updates) if update.job.gradient is None]
    present = [True] * len(updates)
    if missing:
        counts = torch.cat([totals[index]["presence"].double().cpu() for index in missing])
        for index, count in zip(missing, counts.tolist(), strict=True):
            present[index] = count > 0
    return present


def _are_finite(updates: Sequence[Update]) -> bool:
    """Whether all gradients are finite on all processes, which then skip or step together."""
    return not _anywhere(updates, [~update.is_finite() for update in updates])


def _only_creates_state(updates: Sequence[Update]) -> bool:
    """Whether this is a first step of rate 0 on gradients of zeros, which must not count.

    torch.distributed.checkpoint makes an optimizer create its state so when it is asked for the
    state before the first step. Looks at the device in a first step of rate 0 only.
    """
    if not all(update.job.step == 1 and update.job.lr == 0 for update in updates):
        return False
    return not _anywhere(updates, [~update.is_zero() for update in updates])


def _anywhere(updates: Sequence[Update], flags: Sequence[Tensor]) -> bool:
    """Whether a flag () is set, on any process where parameters are sharded."""
    if not flags:
        return False
    flag = torch.stack([each.to(flags[0].device) for each in flags]).any()
    is_sharded = any(update.job.part.reducer is not None for update in updates)
    return any_process(flag) if is_sharded else bool(flag.item())
