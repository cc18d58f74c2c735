# SPDX-License-Identifier: Apache-2.0
"""Gradients that are kept as sketches from backward to step: taken in, averaged, read, forgotten.

One cycle: gradients of micro-batches are added to accumulators with no message; the first question
about them (norm, clipping, the step) averages them over the ranks, once; the step forgets them.
Integrations say where gradients arrive and over which ranks they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.comm.message import Message, Sender
from flora_dist.core.parameters.source import DenseGradients
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.protocols import Part, Reducer, Terms
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Sketches, draw_together
from flora_dist.core.step.cut_blocks import add_partial_, edges_of, fill_
from flora_dist.core.step.gradient import Gradient, SketchedGradient
from flora_dist.core.tiles import Cuts, Tile
from flora_dist.gradients.accumulator import Accumulator
from flora_dist.gradients.average import Arrived, Parcel, Route, carry
from flora_dist.gradients.placeholder import stand_in_for, stands_in


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flow:
    """One parameter's way from backward to step."""

    part: Part
    """What of the parameter is stepped here."""
    geometry: Geometry
    """In blocks and numbers per block of the gradient's sketches."""
    accumulator: Accumulator
    route: Route
    is_partial: bool
    """Blocks cut by columns are sums of what several ranks hold (tensor parallelism)."""
    visible: Tensor | None
    """The parameter in whose ``.grad`` users look; None under an engine that has none."""
    is_gathered: bool
    """Whether gradients arrive at another tensor, whole, and users see this rank's shard."""
    device: torch.device
    """Where gradients arrive."""


class Gradients:
    """All flows of one optimizer, in the order of their names."""

    def __init__(
        self,
        flows: Sequence[Flow],
        *,
        level: str,
        wire_dtype: torch.dtype | None,
        check: Callable[[], None],
    ) -> None:
        """Nothing is kept yet.

        Args:
            flows: equal on all ranks but for what each holds.
            level: of ``LEVELS``, not dense.
            wire_dtype: what travels; None: as accumulated.
            check: raises if the framework was set to do what would be computed wrong.
        """
        self.level, self.wire_dtype, self._check = level, wire_dtype, check
        self.flows = {flow.part.name: flow for flow in sorted(flows, key=lambda f: f.part.name)}
        self._dense = DenseGradients()  # of parameters that are not sketched
        self._mean: dict[str, SketchedGradient] | None = None
        self._forgetting: list[Callable[[], None]] = []

    # ---- taking in

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
        if not _is_shown(flow):
            raise RuntimeError(
                "a gradient can be added to only until it is stepped or zeroed; that of "
                f"{flow.part.name!r} has been, after it was read. Read p.grad again after "
                "backward."
            )
        if not flow.is_gathered:
            self.take(flow, gradient)
            return
        self._open(flow)
        route = flow.route
        for tile in route.kept[route.rank]:
            flow.accumulator.add_part_(gradient * route.weight_of_mean, tile)

    def take_sketch(self, flow: Flow, sketched: Tensor, step: int) -> None:
        """Add what is a sketch already, taken in the basis of ``step``."""
        self._open(flow)
        flow.accumulator.add_sketch_(sketched, step)
        self._show(flow)

    def _open(self, flow: Flow) -> None:
        is_new = flow.visible is not None and not stands_in(flow.visible.grad)
        if is_new:  # nothing yet, or zero_grad() since
            flow.accumulator.drop()
            if self._mean is not None and not any(map(_is_shown, self.flows.values())):
                self._mean = None
        if self._mean is not None:
            raise RuntimeError(
                "sketches of gradients are averaged over the ranks once per step; a gradient of "
                f"{flow.part.name!r} came after that. Call grad_norm() and clip_grad_norm_() after "
                "the last micro-batch, or zero_grad() first."
            )

    def _show(self, flow: Flow) -> None:
        parameter = flow.visible
        if parameter is None or stands_in(parameter.grad):
            return
        parameter.grad = None
        parameter.grad = stand_in_for(
            parameter,
            name=flow.part.name,
            add_to_sketch=lambda gradient: self.add(flow, gradient),
            drop_sketch=lambda: _hide(flow),
        )

    @property
    def is_open(self) -> bool:
        """Whether something has come in since the last step and was not dropped."""
        flows = self.flows.values()
        return any(f.accumulator.sums_ENKR is not None for f in flows if f.visible is None) or any(
            map(_is_shown, flows)
        )

    # ---- averaging

    def reduce(self) -> None:
        """Average over the ranks what has come in, unless that is done already.

        All ranks of a flow's route must call this, whatever gradients they have.

        Raises:
            RuntimeError: the optimizer has loaded another step since the gradients came in.
        """
        if self._mean is not None and (not self._is_shown_at_all() or self._shows_anything()):
            return
        self._check()
        for flow in self.flows.values():
            flow.accumulator.check_basis()
            if flow.visible is not None and flow.visible.grad is None:  # zero_grad() since
                flow.accumulator.drop()
        arrived = carry([_parcel(flow) for flow in self.flows.values()], wire_dtype=self.wire_dtype)
        pairs = list(zip(self.flows.values(), arrived, strict=True))
        present = _present(pairs)
        self._mean = {}
        for (flow, kept), is_here in zip(pairs, present, strict=True):
            if is_here:
                self._mean[flow.part.name] = _read(flow, kept)
                self._show(flow)
        self._complete(self._mean)

    def _is_shown_at_all(self) -> bool:
        return any(flow.visible is not None for flow in self.flows.values())

    def _shows_anything(self) -> bool:
        return any(map(_is_shown, self.flows.values()))

    def _complete(self, mean: dict[str, SketchedGradient]) -> None:
        """Add the pieces of blocks that tensor parallelism cuts: one message per group of ranks."""
        together: dict[Reducer, list[tuple[Flow, Cuts]]] = {}
        for name, flow in self.flows.items():
            cuts, reducer = flow.part.cuts(flow.geometry.block), flow.part.reducer
            if flow.is_partial and cuts.blocks_anywhere and name in mean and reducer is not None:
                together.setdefault(reducer, []).append((flow, cuts))
        for reducer, cut in together.items():
            partial = [_cut_sketches(flow, cuts, mean[flow.part.name]) for flow, cuts in cut]
            senders = [
                Sender(kind=name, names=(name,), cuts=cuts, sends_all=True)
                for name, cuts in ((flow.part.name, cuts) for flow, cuts in cut)
            ]
            totals = Message(senders, reducer).sum(partial)
            for (flow, cuts), total in zip(cut, totals, strict=True):
                for tile, compressed_1NKR in _by_matrix(flow, mean[flow.part.name]):
                    edges = edges_of(tile, flow.geometry, cuts)
                    fill_(compressed_1NKR, total["blocks"], edges, None)

    # ---- reading

    def mean_of(self, name: str) -> SketchedGradient | None:
        """The mean gradient of a parameter after ``reduce``; None: no rank has one."""
        assert self._mean is not None, "reduce() comes first"
        return self._mean.get(name)

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply all mean gradients."""
        assert self._mean is not None, "reduce() comes first"
        for gradient in self._mean.values():
            for compressed_ENKR in gradient.tiles:
                here = factor.to(compressed_ENKR.device) if isinstance(factor, Tensor) else factor
                compressed_ENKR.mul_(here)

    def check(self, slot: Trainable) -> None:
        """Refuse a full gradient where sketches belong.

        Raises:
            RuntimeError: naming the parameter.
            ValueError: the weight has another shape than when gradients were attached.
        """
        flow, gradient = self.flows.get(slot.name), slot.tensor.grad
        if flow is None:
            self._dense.check(slot)
            return
        if flow.geometry.shape != slot.part.shape:
            raise ValueError(
                f"a weight must keep the shape that gradients were attached to; {slot.name!r} had "
                f"{flow.geometry.shape} and has {slot.part.shape}. Make a new optimizer and attach "
                "it."
            )
        if flow.visible is None or gradient is None or stands_in(gradient):
            return
        if not self._asks_for_state(slot):
            raise RuntimeError(
                f"with gradients={self.level!r} no full gradient may be left in .grad; that of "
                f"{slot.name!r} is there: its hook did not fire, or something wrote it. Call "
                "attach() on the model that is trained, after sharding, and do not write .grad."
            )

    def _asks_for_state(self, slot: Trainable) -> bool:
        """Whether a zero gradient at rate 0 was written where sketches belong, before any step.

        torch.distributed.checkpoint asks for state so. Looks at the device at a rate of 0 only.
        """
        flow, gradient = self.flows.get(slot.name), slot.tensor.grad
        if flow is None or flow.visible is None or gradient is None or stands_in(gradient):
            return False
        return slot.group["lr"] == 0 and not bool(gradient.any())

    def read(self, slots: Sequence[Trainable]) -> list[Gradient]:
        """Each slot's gradient, averaged over the ranks if it is sketched."""
        if any(map(self._asks_for_state, slots)):
            return self._dense.read(slots)
        self.reduce()
        return [
            self.mean_of(slot.name) if slot.name in self.flows else slot.part.gradient()
            for slot in slots
        ]

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """What travels, and the rank of each parameter's sketches."""
        ranks = {name: {"gradient_rank": f.geometry.rank} for name, f in self.flows.items()}
        return {"": {"wire_dtype": str(self.wire_dtype)}, **ranks}

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
        for flow in self.flows.values():
            flow.accumulator.drop()
            if _is_shown(flow):
                _hide(flow)
        self._mean = None
        self._draw()
        for call in self._forgetting:
            call()

    def _draw(self) -> None:
        """A of the coming step, of all at once: each alone costs a hundred small calls."""
        alike: dict[tuple[torch.dtype, torch.device], list[tuple[Sketches, int]]] = {}
        for flow in self.flows.values():
            place = (flow.accumulator.dtype, flow.device)
            alike.setdefault(place, []).append(flow.accumulator.basis)
        for (dtype, device), wanted in alike.items():
            draw_together(wanted, dtype=dtype, device=device)


def _is_shown(flow: Flow) -> bool:
    return flow.visible is not None and stands_in(flow.visible.grad)


def _hide(flow: Flow) -> None:
    """As ``zero_grad()`` leaves a parameter; what was sketched is dropped when that is noticed."""
    assert flow.visible is not None
    flow.visible.grad = None


def _parcel(flow: Flow) -> Parcel:
    return Parcel(route=flow.route, accumulator=flow.accumulator, device=flow.device)


def _present(pairs: Sequence[tuple[Flow, Arrived]]) -> list[bool]:
    """Whether any rank has a gradient; asks the device only where this rank has none."""
    present = [kept.was_here for _, kept in pairs]
    flags = {i: kept.presence for i, (_, kept) in enumerate(pairs) if not present[i]}
    asked = {index: flag for index, flag in flags.items() if flag is not None}
    if asked:
        counts = torch.stack([flag.double().cpu() for flag in asked.values()])
        for index, count in zip(asked, counts.tolist(), strict=True):
            present[index] = count > 0
    return present


def _read(flow: Flow, kept: Arrived) -> SketchedGradient:
    """On the device of the step, which with CPU offload is not that of backward."""
    device = flow.part.weight().device
    first, stop = flow.part.matrices
    origin = flow.accumulator.tile.matrices[0] if flow.accumulator.tile is not None else first
    sketch_ERB = flow.accumulator.sketch(device)[first - origin : stop - origin]
    tiles = tuple(tile.to(device) for tile in kept.tiles)
    return SketchedGradient(tiles=tiles, sketch_ERB=sketch_ERB, first_matrix=first)


def _cut_sketches(flow: Flow, cuts: Cuts, gradient: SketchedGradient) -> Terms:
    """What this rank has of each cut block's sketch."""
    slots_1SR = gradient.sketch_ERB.new_zeros(1, len(cuts.blocks), flow.accumulator.rank)
    for tile, compressed_1NKR in _by_matrix(flow, gradient):
        add_partial_(slots_1SR, compressed_1NKR, edges_of(tile, flow.geometry, cuts))
    return {"blocks": slots_1SR}


def _by_matrix(flow: Flow, gradient: SketchedGradient) -> Iterator[tuple[Tile, Tensor]]:
    """Each matrix of each tile alone, as a view."""
    for tile, compressed_ENKR in zip(flow.part.tiles, gradient.tiles, strict=True):
        for place, matrix in enumerate(range(*tile.matrices)):
            yield replace(tile, matrices=(matrix, matrix + 1)), compressed_ENKR[place : place + 1]
