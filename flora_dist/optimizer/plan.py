# SPDX-License-Identifier: Apache-2.0
"""A step, planned once: which parameters are stepped together, and where their sums travel.

A plan holds until something structural changes: which parameters take part and have gradients,
their settings, their memory, their steps. Parameters stand together where nothing but their memory
differs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flora_dist.comm.message import Message, Sender, sum_terms
from flora_dist.optim.batch import Batch, Member, Phases, arithmetic_dtype
from flora_dist.optim.gradient import Gradient, SketchedGradient
from flora_dist.optim.matrix import MatrixPhases
from flora_dist.optim.part import Reducer, Terms
from flora_dist.optim.pieces import work_limit
from flora_dist.optim.sketches import BatchSketches
from flora_dist.optim.vector import VectorPhases
from flora_dist.optimizer.slots import Slot

# Torch cuts a sum that gives one number among threads from here on, and none that gives several:
# what is longer stands alone, so that its bits do not depend on what else is stepped.
LONGEST_SUM = 1 << 15
# ZeRO steps each of its groups by itself; where gradients come and go, plans are made anew.
MOST_PLANS = 64
State = Mapping[Tensor, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A batch, how it is stepped, and which of the step's gradients are its members'."""

    batch: Batch
    phases: Phases
    places: tuple[int, ...]
    """Of its members among the slots of the step."""
    sender: Sender
    has_gradients: bool

    @property
    def name(self) -> str:
        """Of the first member."""
        return self.sender.names[0]


class Plan:
    """Batches of a step, in the order of their first names, and their messages."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry.name)
        self._messages: list[tuple[list[int], Message | None]] = []
        groups: dict[Reducer | None, list[int]] = {}
        for index, entry in enumerate(self.entries):
            groups.setdefault(entry.batch.reducer, []).append(index)
        for reducer, indices in groups.items():
            senders = [self.entries[index].sender for index in indices]
            message = None if reducer is None else Message(senders, reducer)
            self._messages.append((indices, message))

    def is_current(self, slots: Sequence[Slot], state: State) -> bool:
        """Whether weights, state and steps are still those that this was made for."""
        for entry in self.entries:
            members = entry.batch.members
            step, window = members[0].state["step"], members[0].state["window"]
            for member, place in zip(members, entry.places, strict=True):
                slot, own = slots[place], member.state
                if slot.own_state(state.get(slot.tensor, {})) is not own:
                    return False
                if own["step"] != step or own["window"] != window or not member.is_current():
                    return False
        return True

    def without(self, absent: set[int]) -> Plan:
        """The same without some of the entries."""
        return Plan([entry for i, entry in enumerate(self.entries) if i not in absent])

    def sum(self, terms: Sequence[Terms]) -> list[Terms]:
        """Sum each batch's terms over its ranks: a message per group of ranks."""
        totals: list[Terms] = [{} for _ in self.entries]
        for indices, message in self._messages:
            sums = sum_terms([terms[index] for index in indices], message)
            for index, total in zip(indices, sums, strict=True):
                totals[index] = total
        return totals


class Plans:
    """The last plan of each selection of slots that is stepped."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Sequence[Slot], Plan]] = {}

    def plan_for(
        self, slots: Sequence[Slot], gradients: Sequence[Gradient], state: State
    ) -> Plan | None:
        """The plan that was kept, if it still holds."""
        slots_then, plan = self._kept.get(_signature(slots, gradients), ((), None))
        # Slots that a plan keeps alive cannot lend their ids to others.
        return plan if plan is not None and plan.is_current(slots_then, state) else None

    def keep(self, slots: Sequence[Slot], gradients: Sequence[Gradient], plan: Plan) -> None:
        """Keep a plan; the oldest goes where there are many."""
        if len(self._kept) >= MOST_PLANS:
            del self._kept[next(iter(self._kept))]
        self._kept[_signature(slots, gradients)] = slots, plan


def _signature(slots: Sequence[Slot], gradients: Sequence[Gradient]) -> Hashable:
    return tuple(map(id, slots)), tuple(map(type, gradients))


def make_plan(slots: Sequence[Slot], gradients: Sequence[Gradient], state: State) -> Plan:
    """Plan a step of slots that have state, given in an order that all ranks share."""
    alike: dict[Hashable, list[int]] = {}
    members = [member_of(slot, state[slot.tensor]) for slot in slots]
    for index, (slot, gradient) in enumerate(zip(slots, gradients, strict=True)):
        key: Hashable = (_kind(slot, members[index]), _here(slot, members[index], gradient))
        if not _may_stand_with_others(slot, members[index], gradient):
            key = index
        alike.setdefault(key, []).append(index)
    entries = []
    for indices in alike.values():
        for some in _chunks(indices, [members[index] for index in indices], slots[indices[0]]):
            has_gradients = gradients[some[0]] is not None
            entries.append(_entry(some, slots, members, has_gradients=has_gradients))
    return Plan(entries)


def member_of(slot: Slot, state: dict[str, Any]) -> Member:
    """A slot as plain tensors of this rank."""
    part, own = slot.part, slot.own_state(state)
    kept = {entry.name: own[entry.name] for entry in slot.entries}
    local = {name: part.local(tensor) for name, tensor in kept.items()}
    return Member(
        part=part,
        name_key=slot.name_key,
        tiles=part.tiles,
        cuts=slot.cuts,
        state=own,
        kept=kept,
        local=local,
        weight=part.weight(),
        address=part.address(),
        local_addresses=tuple(tensor.data_ptr() for tensor in local.values()),
    )


def _entry(
    indices: Sequence[int], slots: Sequence[Slot], members: Sequence[Member], *, has_gradients: bool
) -> Entry:
    slot, own = slots[indices[0]], tuple(members[index] for index in indices)
    weight = own[0].weight
    sketches = [slots[index].sketches for index in indices]
    batch = Batch(
        members=own,
        geometry=slot.geometry,
        config=slot.config,
        group=slot.group,
        sign=-1.0 if slot.group["maximize"] else 1.0,
        dtype=arithmetic_dtype(weight.dtype),
        device=weight.device,
        sketches=BatchSketches([each for each in sketches if each is not None])
        if sketches[0] is not None
        else None,
    )
    sender = Sender(
        kind=_kind(slot, own[0]),
        names=tuple(member.part.name for member in own),
        cuts=own[0].cuts,
        sends_all=slot.part.splits_matrices or slot.geometry.is_vector,
    )
    phases = VectorPhases(batch) if slot.geometry.is_vector else MatrixPhases(batch)
    return Entry(
        batch=batch,
        phases=phases,
        places=tuple(indices),
        sender=sender,
        has_gradients=has_gradients,
    )


def _kind(slot: Slot, member: Member) -> Hashable:
    """What parameters of a batch, and of a stretch of a message, have in common on all ranks."""
    part, cuts = slot.part, member.cuts
    return (
        slot.geometry,
        slot.config,
        id(slot.group),
        slot.group["maximize"],
        member.weight.dtype,
        part.reducer,
        part.splits_matrices,
        cuts.rows_anywhere,
        cuts.blocks_anywhere,
        cuts.peers is None,
        member.state["step"],
        member.state["window"],
    )


def _here(slot: Slot, member: Member, gradient: Gradient) -> Hashable:
    """What they have in common on this rank besides."""
    return (
        member.tiles,
        slot.part.matrices,
        member.weight.device,
        isinstance(gradient, SketchedGradient),
        tuple((name, tuple(t.shape), t.dtype) for name, t in member.local.items()),
    )


def _may_stand_with_others(slot: Slot, member: Member, gradient: Gradient) -> bool:
    size, tiles, part = slot.geometry, member.tiles, slot.part
    first, last = part.matrices
    is_cut = bool(tiles) and tiles[0].columns != (0, size.num_columns) and not size.is_vector
    shares_cuts = member.cuts.peers is not None and len(member.cuts.rows) > 0
    longest = max((max(tile.sizes[1:]) for tile in tiles), default=0)
    return (
        gradient is not None
        and len(tiles) <= 1
        and not (is_cut and size.num_matrices > 1)
        and not shares_cuts
        and not (part.splits_matrices and last - first < size.num_matrices)
        and member.weight.is_contiguous()
        and longest < LONGEST_SUM
        and (slot.sketches is None or slot.sketches.is_small)
    )


def _chunks(
    indices: Sequence[int], members: Sequence[Member], slot: Slot
) -> Sequence[Sequence[int]]:
    """Vectors are stepped whole: as many together as make a piece of work. Matrices are cut."""
    if not slot.geometry.is_vector:
        return [indices]
    weight = members[0].weight
    count = max(1, work_limit(weight.device) // max(1, weight.numel()))
    return [indices[start : start + count] for start in range(0, len(indices), count)]
