# SPDX-License-Identifier: Apache-2.0
"""One step over all parameters: measure, sum, couple, sum, finish.

Two messages at most per group of ranks, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flora_dist.comm.message import sum_terms
from flora_dist.optim.job import Job, Update
from flora_dist.optim.matrix import MatrixUpdate
from flora_dist.optim.part import Reducer, Terms
from flora_dist.optim.vector import VectorUpdate
from flora_dist.optimizer.slots import Slot


def run_step(slots: Sequence[Slot], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Update the parameters of ``slots``, which every rank gives in the same order."""
    # Without peers a missing gradient is missing everywhere; with peers it takes a place in the
    # message, since another rank may have one.
    jobs = [slot.job(state[slot.tensor]) for slot in slots]
    jobs = [j for j in jobs if j.part.reducer is not None or j.part.gradient() is not None]
    updates = [_update_of(job) for job in jobs]
    totals = _sum(updates, [update.measure() for update in updates])
    if any(job.config.skip_nonfinite for job in jobs) and not _is_finite(totals):
        return
    active = [
        (update, total)
        for update, total in zip(updates, totals, strict=True)
        if _is_present(update, total)
    ]
    updates = [update for update, _ in active]
    totals = _sum(updates, [update.couple(total) for update, total in active])
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
        sums = sum_terms([terms[index] for index in indices], reducer)
        for index, total in zip(indices, sums, strict=True):
            totals[index] = total
    return totals


def _is_present(update: Update, total: Terms) -> bool:
    """Whether any rank has a gradient; asks the device only where this rank has none."""
    return update.job.part.gradient() is not None or bool(total["presence"].item() > 0)


def _is_finite(totals: Sequence[Terms]) -> bool:
    """Whether every sum is finite: a NaN or inf in a gradient reaches its sums of squares."""
    sums = [value.sum() for total in totals for value in total.values()]
    return not sums or bool(torch.stack([s.to(sums[0]) for s in sums]).isfinite().all().item())
