# SPDX-License-Identifier: Apache-2.0
"""``optimizer.step()`` as a CUDA graph: one launch in place of five for each kind of parameter.

The host counts steps and derives keys, so a step cannot be part of a larger graph. It sends what
changes from step to step, and then replays a graph that was recorded of an earlier step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_dist.core.parameters.registry import Registry, takes_part
from flora_dist.core.parameters.source import GradientSource
from flora_dist.core.parameters.trainable import Group
from flora_dist.core.step.batch import Moment
from flora_dist.core.step.gradient import Gradient, SketchedGradient
from flora_dist.core.step.phases import moment_of
from flora_dist.core.step.plan import Entry, Plan
from flora_dist.kernels.gpu.phases import GpuPhases
from flora_dist.kernels.gpu.vector_phases import GpuVectorPhases

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""From what launches kernels to what launches the same ones again."""


class Stepped(Protocol):
    """The parts of an optimizer that are recorded."""

    @property
    def param_groups(self) -> list[Group]:
        """Settings, and what stands in the groups now."""

    @property
    def state(self) -> Any:
        """This rank's state."""

    @property
    def roster(self) -> Registry:
        """How it is stepped."""

    @property
    def gradients(self) -> GradientSource:
        """Where a step takes its gradients from."""

    def step(self) -> Any:
        """Update the parameters."""


def record_graph(launch: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph; nothing is stepped while it is recorded."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    replay: Callable[[], None] = graph.replay
    return replay


class CapturedStep:
    """Steps an optimizer, by a recorded graph wherever one fits.

    The optimizer's own ``step()`` runs where no graph fits: at first, when a window of sketches
    begins, when groups or settings change, and when gradients lie elsewhere: keep them in place by
    ``zero_grad(set_to_none=False)``. Learning rates and weight decays may change at every step.
    Both ways give the same bits. Hooks of the optimizer run with its own ``step()`` only.

    ::

        stepper = CapturedStep(optimizer)
        loss.backward()
        stepper.step()

    Raises:
        ValueError: parameters that the Triton kernels do not step, that other ranks hold parts of,
            or ``skip_nonfinite``, which asks the device; nothing has changed then.
    """

    def __init__(self, optimizer: Stepped, record: Record = record_graph) -> None:
        """``record``: how launches are recorded."""
        self._optimizer, self._record = optimizer, record
        self._of: Hashable = None
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters."""
        plan, gradients = self._plan()
        if plan is None:
            self._of = self._replay = None
            self._optimizer.step()
            return
        _check(plan)
        moments = [
            moment_of(entry.batch, [gradients[place] for place in entry.places])
            for entry in plan.entries
        ]
        found = _signature(plan, gradients)
        if found != self._of or any(map(_begins_window, plan.entries, moments)):
            # Its kernels are compiled by this step, before they are recorded at the next one.
            self._of, self._replay = found, None
            self._optimizer.step()
            return
        sent = [_phases(entry).send(now) for entry, now in zip(plan.entries, moments, strict=True)]
        if self._replay is None:
            self._replay = self._record(lambda: _launch(plan, moments, sent))
        self._replay()
        for entry, now in zip(plan.entries, moments, strict=True):
            for member in entry.batch.members:
                member.state["step"], member.state["window"] = now.step, now.window

    def _plan(self) -> tuple[Plan | None, list[Gradient]]:
        """The plan that the next step will find, if it still holds, and its gradients."""
        optimizer = self._optimizer
        slots = optimizer.roster.present(optimizer.param_groups, optimizer.state)
        slots = sorted(filter(takes_part, slots), key=attrgetter("name"))
        plan = optimizer.roster.kept_plan(slots, optimizer.state)
        if plan is None:
            return None, []
        gradients = optimizer.gradients.read(slots)
        if plan.kinds != [type(gradient) for gradient in gradients]:
            return None, []
        return plan, gradients


def _check(plan: Plan) -> None:
    if SketchedGradient in plan.kinds:
        raise ValueError(
            "a captured step must read gradients that lie where they lay; sketched ones come with "
            "other matrices at every step. Call optimizer.step()."
        )
    for entry in plan.entries:
        names = ", ".join(member.name for member in entry.batch.members[:3])
        is_ours = isinstance(entry.phases, GpuPhases | GpuVectorPhases)
        if not is_ours:
            raise ValueError(
                f"a captured step must be by the Triton kernels alone; {names} are stepped by "
                "torch's operators, optimizer.report() says why. Call optimizer.step()."
            )
        if entry.batch.reducer is not None or entry.batch.config.skip_nonfinite:
            raise ValueError(
                f"a captured step must ask nobody; that of {names} sends messages to other ranks, "
                "or looks for gradients that are not finite. Call optimizer.step()."
            )


def _phases(entry: Entry) -> GpuPhases | GpuVectorPhases:
    assert isinstance(entry.phases, GpuPhases | GpuVectorPhases)
    return entry.phases


def _signature(plan: Plan, gradients: Sequence[Gradient]) -> Hashable:
    """What a graph was recorded for; the plan itself, so that its id is not used again."""
    return plan, tuple(
        (g.data_ptr(), g.dtype, g.stride()) for g in gradients if isinstance(g, Tensor)
    )


def _begins_window(entry: Entry, now: Moment) -> bool:
    return bool(entry.batch.members[0].state["window"] != now.window)


def _launch(plan: Plan, moments: Sequence[Moment], sent: Sequence[Any]) -> None:
    """Every phase of a step; nobody is asked in between, so that terms are their own sums."""
    for entry, now, given in zip(plan.entries, moments, sent, strict=True):
        phases: Any = _phases(entry)
        measured = phases.measure_sent(now, given)
        coupled = phases.couple(now, measured, measured.terms)
        tallied = phases.tally(now, coupled, coupled.terms)
        phases.finish(now, tallied, tallied.terms)
