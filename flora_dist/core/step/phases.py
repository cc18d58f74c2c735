# SPDX-License-Identifier: Apache-2.0
"""One step over all parameters: measure, sum, couple, sum, tally, sum, finish.

Three messages at most per group of ranks, whatever the number of parameters; most layouts and rules
have nothing to say in the second and third. Where more than two ranks share cut rows, an exchange
of these comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.comm.groups import any_process
from flora_dist.core.protocols import Terms
from flora_dist.core.state.settings import OF_ONE_GRADIENT
from flora_dist.core.step.basis import Basis, DenseBasis
from flora_dist.core.step.batch import Across, Batch, Moment
from flora_dist.core.step.gradient import Gradient
from flora_dist.core.step.plan import Plan
from flora_dist.core.step.rates import corrected


def check_not_captured() -> None:
    """Refuse to step inside a CUDA graph."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "Flora counts steps and windows on the host; a CUDA graph would replay one step for "
            "ever. Leave optimizer.step() out of the capture; "
            "flora_dist.kernels.gpu.graph.CapturedStep records a step by itself."
        )


def run_step(plan: Plan, gradients: Sequence[Gradient], *, may_only_create_state: bool) -> None:
    """Update the parameters of a plan.

    ``gradients``: in the order of the slots that were planned. ``may_only_create_state``: a first
    step of rate 0 on zeros does not count.
    """
    moments = [
        moment_of(entry.batch, [gradients[place] for place in entry.places])
        for entry in plan.entries
    ]
    may_only_create_state = may_only_create_state and _is_first_of_rate_0(moments)
    if plan.at_once is not None and not may_only_create_state:
        plan.at_once(moments)
        _count(plan, moments)
        return
    if plan.across is not None and not may_only_create_state:
        _step_across(plan, plan.across, moments)
        _count(plan, moments)
        return
    pairs = list(zip(plan.entries, moments, strict=True))
    measured = [entry.phases.measure(now) for entry, now in pairs]
    totals = [stage.terms for stage in measured]
    if plan.exchanges_rows:
        plan.exchange_(totals)
        for (entry, now), stage in zip(pairs, measured, strict=True):
            if entry.exchanges_rows:
                entry.phases.take_rows(now, stage)
    plan.sum_(totals)
    asks_finite = any(entry.batch.config.skip_nonfinite for entry in plan.entries)
    if asks_finite and not _are_finite(plan, measured):
        return
    if may_only_create_state and _are_zeros(plan, measured):
        return
    absent = _absent(plan, totals)
    if absent:
        plan = plan.without(absent)
        moments, measured, totals = (
            _kept(values, absent) for values in (moments, measured, totals)
        )
    _apply(plan, moments, measured, totals)


def _step_across(plan: Plan, across: Across, moments: Sequence[Moment]) -> None:
    begun = across.measure(moments)
    if plan.exchanges_rows:
        plan.exchange_(across.terms)
        across.take_rows(begun)
    plan.sum_across_()
    across.finish(begun)


def _apply(
    plan: Plan, moments: Sequence[Moment], measured: Sequence[Any], totals: Sequence[Terms]
) -> None:
    """The rest of the step, once it is known that there is one."""
    phases = [entry.phases for entry in plan.entries]
    steps = list(zip(phases, moments, strict=True))
    coupled = [
        each.couple(now, stage, total)
        for (each, now), stage, total in zip(steps, measured, totals, strict=True)
    ]
    totals = [stage.terms for stage in coupled]
    plan.sum_(totals)
    tallied = [
        each.tally(now, stage, total)
        for (each, now), stage, total in zip(steps, coupled, totals, strict=True)
    ]
    totals = [stage.terms for stage in tallied]
    plan.sum_(totals)
    for (each, now), stage, total in zip(steps, tallied, totals, strict=True):
        each.finish(now, stage, total)
    _count(plan, moments)


def _count(plan: Plan, moments: Sequence[Moment]) -> None:
    for entry, now in zip(plan.entries, moments, strict=True):
        step, window = now.step, now.window
        for member in entry.batch.members:
            state = member.state
            state["step"], state["window"] = step, window


def moment_of(batch: Batch, gradients: Sequence[Gradient]) -> Moment:
    """A batch at its coming step."""
    first, config = batch.members[0], batch.config
    step, old_window = int(first.state["step"]) + 1, int(first.state["window"])
    window = step // config.kappa
    basis: Basis = DenseBasis()
    if batch.sketches is not None:
        basis = batch.sketches.change(old_window, window, dtype=batch.dtype, device=batch.device)
    return Moment(
        gradients=gradients,
        is_missing=gradients[0] is None,
        lr=_number(first.group["lr"]),
        weight_decay=_number(first.group["weight_decay"]),
        step=step,
        window=window,
        beta2=_beta2_of(batch, step),
        basis=basis,
    )


def _beta2_of(batch: Batch, step: int) -> float:
    """0 for matrices that are normalised by this gradient alone."""
    if batch.config.normalise in OF_ONE_GRADIENT and not batch.geometry.is_vector:
        return 0.0
    return beta2_at(step, batch.config.beta2)


def _number(value: float | Tensor) -> float | Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else value


def beta2_at(step: int, beta2: float | None) -> float:
    """Decay of the second moment at the ``step``-th real step, counted from 1.

    None: 1 - t^-0.8 (Adafactor, arXiv 1804.04235, section 7.2). A constant: ``corrected``.

    >>> beta2_at(1, None), beta2_at(1, 0.99)
    (0.0, 0.0)
    """
    if beta2 is None:
        return float(1.0 - step**-0.8)
    return corrected(beta2, step)


def _kept(values: Sequence[Any], absent: set[int]) -> list[Any]:
    return [value for index, value in enumerate(values) if index not in absent]


def _absent(plan: Plan, totals: Sequence[Terms]) -> set[int]:
    """Entries of which no rank has a gradient; asks the device only where this rank has none."""
    missing = [i for i, entry in enumerate(plan.entries) if not entry.has_gradients]
    if not missing:
        return set()
    counts = torch.cat([totals[index]["presence"].double().cpu() for index in missing])
    return {i for i, count in zip(missing, counts.tolist(), strict=True) if count == 0}


def _are_finite(plan: Plan, measured: Sequence[Any]) -> bool:
    """Whether all gradients are finite on all processes, which then skip or step together."""
    pairs = zip(plan.entries, measured, strict=True)
    return not _anywhere(plan, [~entry.phases.is_finite(stage) for entry, stage in pairs])


def _is_first_of_rate_0(moments: Sequence[Moment]) -> bool:
    """Whether this may be a step that must not count.

    torch.distributed.checkpoint makes an optimizer create its state by a first step of rate 0 on
    gradients of zeros when it is asked for the state before the first step. Looks at the device
    in a first step only.
    """
    return all(now.step == 1 and now.lr == 0 for now in moments)


def _are_zeros(plan: Plan, measured: Sequence[Any]) -> bool:
    """Whether all gradients are, on all processes."""
    pairs = zip(plan.entries, measured, strict=True)
    return not _anywhere(plan, [~entry.phases.is_zero(stage) for entry, stage in pairs])


def _anywhere(plan: Plan, flags: Sequence[Tensor]) -> bool:
    """Whether a flag () is set, on any process where parameters are sharded."""
    if not flags:
        return False
    flag = torch.stack([each.to(flags[0].device) for each in flags]).any()
    is_sharded = any(entry.batch.reducer is not None for entry in plan.entries)
    return any_process(flag) if is_sharded else bool(flag.item())
