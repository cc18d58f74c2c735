# SPDX-License-Identifier: Apache-2.0
"""Gradients that are kept as sketches from backward to step: taken in, averaged, read, forgotten.

One cycle: gradients of micro-batches are added to accumulators with no message; the first question
about them (norm, clipping, the step) averages them over the ranks, once; the step forgets them.
Integrations say where gradients arrive and over which ranks they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flora_dist.core.layouts.dtensor import local_gradient
from flora_dist.core.parameters.norms import scale_
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.step.basis import Sketches, draw_together
from flora_dist.core.step.gradient import Gradient, SketchedGradient
from flora_dist.gradients.ahead import SentAhead
from flora_dist.gradients.average import Averaging, are_anywhere
from flora_dist.gradients.cut_sketches import check_in_full, partial_sketches
from flora_dist.gradients.flow import Adapter, Flow
from flora_dist.gradients.placeholder import hide, is_shown, stand_in_for, stands_in
from flora_dist.gradients.request import Wire
from flora_dist.gradients.route import Mean
from flora_dist.gradients.wear import warn_of_wear


class Gradients:
    """All flows of one optimizer, in the order of their names."""

    def __init__(
        self,
        flows: Sequence[Flow],
        *,
        level: str,
        wire: Wire,
        adapter: Adapter,
        known: frozenset[str],
        check_late: Callable[[Trainable], None],
    ) -> None:
        """Nothing is kept yet.

        Args:
            flows: equal on all ranks but for what each holds; in the order of forward.
            level: of ``LEVELS``, not dense.
            wire: what travels.
            adapter: of the framework.
            known: every parameter that trains, with a flow or without.
            check_late: raises if a parameter that is not known should have a flow.
        """
        self.level, self.wire = level, wire
        self._adapter, self._known, self._check_late = adapter, known, check_late
        self.flows = {flow.part.name: flow for flow in sorted(flows, key=lambda f: f.part.name)}
        ordered = list(self.flows.values())
        self._shows = any(flow.source.visible is not None for flow in ordered)
        sums = [flow.accumulator for flow in ordered]
        self._in_few_bits = [each for each in sums if each.code is not None]
        self._averaging = Averaging(
            sums,
            [flow.source.route for flow in ordered],
            wire_dtype=wire.dtype,
            wire_bits=wire.bits,
            ahead=wire.ahead([ordered.index(flow) for flow in reversed(flows)]),
        )
        self._ahead: SentAhead | None = None
        """Of what is sent during backward; None: nothing is."""
        if self._averaging.sends_ahead:
            self._ahead = SentAhead(ordered, self._averaging, adapter.is_last)
        self._cut = partial_sketches(ordered)
        if wire.bits is not None:
            check_in_full(self._cut)
        self._mean: dict[str, SketchedGradient] | None = None
        self._latest: Flow | None = None
        self._forgetting: list[Callable[[], None]] = []

    # ---- taking in

    @torch.no_grad()
    def arrived(self, flow: Flow, tensor: Tensor) -> None:
        """The hook: a gradient has been added to ``tensor.grad``.

        Raises:
            RuntimeError: the gradients of this step have been averaged already.
            ValueError: it is placed unlike its parameter.
        """
        gradient = tensor.grad
        if gradient is None:
            return
        if not stands_in(gradient):  # else added to the sketches already
            if isinstance(tensor, DTensor):
                gradient = local_gradient(tensor, flow.part.name)
            self.take(flow, gradient)
            if tensor is not flow.source.visible:
                tensor.grad = None
        if self._ahead is not None:
            self._ahead.arrived(flow)

    def take(self, flow: Flow, gradient: Tensor) -> None:
        """Add a full gradient to the sketches; it may be freed afterwards.

        Raises:
            RuntimeError: the gradients of this step have been averaged already.
        """
        self._open(flow)
        flow.accumulator.add_(gradient)
        self._show(flow)

    def add(self, flow: Flow, gradient: Tensor) -> None:
        """Add to what the visible ``.grad`` stands for, whoever does it: autograd or a user.

        Raises:
            RuntimeError: it stands for nothing any more, or has been averaged already.
        """
        if not is_shown(flow.source.visible):
            raise RuntimeError(
                "a gradient can be added to only until it is stepped or zeroed; that of "
                f"{flow.part.name!r} has been, after it was read. Read p.grad again after "
                "backward."
            )
        if flow.source.visible is flow.source.tensor:
            self.take(flow, gradient)
            return
        self._open(flow)
        route = flow.source.route
        for tile in route.kept[route.rank]:
            flow.accumulator.add_part_(gradient * route.weight_of_mean, tile)

    def take_sketch(self, flow: Flow, sketched: Tensor, step: int) -> None:
        """Add what is a sketch already, taken in the basis of ``step``."""
        self._open(flow)
        flow.accumulator.add_sketch_(sketched, step)
        self._show(flow)

    def _open(self, flow: Flow) -> None:
        is_new = flow.source.visible is not None and not is_shown(flow.source.visible)
        if is_new:  # nothing yet, or zero_grad() since
            flow.accumulator.drop()
            is_read = self._mean is not None or self._is_under_way
            if is_read and not self._shows_anything():
                self._mean = None
                if self._ahead is not None:
                    self._ahead.drop()
        if self._ahead is not None:
            self._ahead.check_open(flow)
        if self._mean is not None:
            raise RuntimeError(
                "sketches of gradients are averaged over the ranks once per step; a gradient of "
                f"{flow.part.name!r} came after that. Call grad_norm() and clip_grad_norm_() after "
                "the last micro-batch, or zero_grad() first."
            )

    def _show(self, flow: Flow) -> None:
        parameter, self._latest = flow.source.visible, flow
        if parameter is None or stands_in(parameter.grad):
            return
        parameter.grad = None
        parameter.grad = stand_in_for(
            parameter,
            name=flow.part.name,
            add_to_sketch=partial(self.add, flow),
            drop_sketch=partial(hide, parameter),
        )

    @property
    def is_open(self) -> bool:
        """Whether something has come in since the last step and was not dropped."""
        return self._is_under_way or any(
            flow.accumulator.sums_ENKR is not None
            if flow.source.visible is None
            else is_shown(flow.source.visible)
            for flow in self.flows.values()
        )

    @property
    def _is_under_way(self) -> bool:
        return self._ahead is not None and self._ahead.is_under_way

    # ---- averaging

    def reduce(self) -> None:
        """Average over the ranks what has come in, unless that is done already.

        All ranks of a flow's route must call this, whatever gradients they have.

        Raises:
            RuntimeError: the optimizer has loaded another step since the gradients came in.
        """
        if self._mean is not None and (not self._shows or self._shows_anything()):
            return
        watched, check = self._adapter.watched, self._adapter.check
        if check is not None and any(getattr(owner, name, None) for owner, name in watched):
            check()
        if self._ahead is not None:
            self._ahead.check_kept()
        for flow in self.flows.values():
            flow.accumulator.check_basis()
            visible = flow.source.visible
            if visible is not None and visible.grad is None:  # zero_grad() since
                flow.accumulator.drop()
        if self._in_few_bits:
            warn_of_wear(self._in_few_bits)
        means = self._averaging.run()
        self._mean = {}
        for flow, mean, is_here in zip(
            self.flows.values(), means, are_anywhere(means), strict=True
        ):
            if is_here:
                self._mean[flow.part.name] = _read(flow, mean)
                self._show(flow)
        for partials in self._cut:
            partials.complete_(self._mean)

    def _shows_anything(self) -> bool:
        latest = self._latest  # asked first: it nearly always is
        return (latest is not None and is_shown(latest.source.visible)) or any(
            is_shown(flow.source.visible) for flow in self.flows.values()
        )

    # ---- reading

    def mean_of(self, name: str) -> SketchedGradient | None:
        """The mean gradient of a parameter after ``reduce``; None: no rank has one."""
        assert self._mean is not None, "reduce() comes first"
        return self._mean.get(name)

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply all mean gradients."""
        assert self._mean is not None, "reduce() comes first"
        scale_(list(self._mean.values()), factor)

    def check(self, slots: Sequence[Trainable]) -> None:
        """Refuse full gradients where sketches belong.

        Raises:
            RuntimeError: naming the parameter.
            ValueError: the weight has another shape than when gradients were attached.
        """
        for slot in slots:
            flow = self.flows.get(slot.name)
            if flow is not None:
                self._check_sketched(slot, flow)
                continue
            if slot.name not in self._known:
                self._check_late(slot)
            slot.part.gradient()  # refuses what its layout cannot read

    def _check_sketched(self, slot: Trainable, flow: Flow) -> None:
        if flow.geometry.shape != slot.part.shape:
            raise ValueError(
                f"a weight must keep the shape that gradients were attached to; {slot.name!r} had "
                f"{flow.geometry.shape} and has {slot.part.shape}. Make a new optimizer and attach "
                "it."
            )
        if _full_gradient(slot, flow) is not None and not self._asks_for_state(slot):
            raise RuntimeError(
                f"with gradients={self.level!r} no full gradient may be left in .grad; that of "
                f"{slot.name!r} is there: its hook did not fire, or something wrote it. Call "
                "attach() on the model that is trained, after sharding, and do not write .grad."
            )

    def _asks_for_state(self, slot: Trainable) -> bool:
        """Whether a zero gradient at rate 0 was written where sketches belong, before any step.

        torch.distributed.checkpoint asks for state so. Looks at the device at a rate of 0 only.
        """
        gradient = _full_gradient(slot, self.flows.get(slot.name))
        return gradient is not None and slot.group["lr"] == 0 and not bool(gradient.any())

    def read(self, slots: Sequence[Trainable]) -> list[Gradient]:
        """Each slot's gradient, averaged over the ranks if it is sketched."""
        if any(map(self._asks_for_state, slots)):
            return [slot.stepped.gradient() for slot in slots]
        self.reduce()
        return [
            self.mean_of(slot.name) if slot.name in self.flows else slot.stepped.gradient()
            for slot in slots
        ]

    @property
    def needs_others(self) -> bool:
        """Whether a gradient is complete only once other ranks have sent theirs."""
        return bool(self._cut) or any(flow.source.route.travels for flow in self.flows.values())

    def read_ahead(self, slots: Sequence[Trainable]) -> list[Gradient]:
        """The gradients of some slots, whose sketches end with it; nothing may travel."""
        assert not self.needs_others, "sketches are averaged over ranks once per step"
        return [
            self._ended(self.flows[slot.name]) if slot.name in self.flows else slot.part.gradient()
            for slot in slots
        ]

    def _ended(self, flow: Flow) -> SketchedGradient | None:
        flow.accumulator.check_basis()
        warn_of_wear([flow.accumulator])
        (mean,) = Averaging([flow.accumulator], [flow.source.route], wire_dtype=None).run()
        return _read(flow, mean) if mean.was_here else None

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """What travels, and rank and bits of each parameter's sketches."""
        kept = {
            name: {"gradient_rank": f.geometry.rank, "gradient_bits": f.geometry.bits}
            for name, f in self.flows.items()
        }
        return {"": {"wire_dtype": str(self.wire.dtype), "wire_bits": str(self.wire.bits)}, **kept}

    # ---- forgetting

    def on_forget(self, call: Callable[[], None]) -> None:
        """Call this whenever a cycle has ended: the basis is another one from here on."""
        self._forgetting.append(call)

    def drop(self) -> None:
        """As ``zero_grad()`` of parameters that show no gradient; nothing where nothing came in."""
        if self.is_open or self._mean is not None:
            self.forget()

    def forget(self) -> None:
        """End the cycle, stepped or not: what came in is dropped."""
        if self._ahead is not None:
            self._ahead.drop()
        for flow in self.flows.values():
            flow.accumulator.drop()
            if is_shown(flow.source.visible):
                hide(flow.source.visible)
        self._mean = None
        self._draw()
        for call in self._forgetting:
            call()

    def _draw(self) -> None:
        """A of the coming step, of all at once: each alone costs a hundred small calls."""
        alike: dict[tuple[torch.dtype, torch.device], list[tuple[Sketches, int]]] = {}
        for flow in self.flows.values():
            place = (flow.accumulator.dtype, flow.accumulator.device)
            alike.setdefault(place, []).append(flow.accumulator.basis)
        for (dtype, device), wanted in alike.items():
            draw_together(wanted, dtype=dtype, device=device)


def arrived(gradients: ref[Gradients], name: str, tensor: Tensor) -> None:
    """A hook that keeps nothing alive: DDP and FSDP2 hold weights where no collector looks."""
    if (alive := gradients()) is not None:
        alive.arrived(alive.flows[name], tensor)


def _full_gradient(slot: Trainable, flow: Flow | None) -> Tensor | None:
    """The full gradient that is where a placeholder belongs; None: there is none."""
    is_placed = flow is not None and flow.source.visible is not None
    return slot.tensor.grad if is_placed and not stands_in(slot.tensor.grad) else None


def _read(flow: Flow, mean: Mean) -> SketchedGradient:
    """On the device of the step, which with CPU offload is not that of backward."""
    device = flow.part.weight().device
    return SketchedGradient(
        tiles=tuple(tile.to(device) for tile in mean.tiles),
        sketch_ERB=flow.accumulator.sketch(device)[flow.matrices],
        first_matrix=flow.first_matrix,
    )
