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

from flora_dist.comm.message import Message, Sender, sum_terms
from flora_dist.optim.batch import Batch, Member, Phases, arithmetic_dtype
from flora_dist.optim.gradient import Gradient, SketchedGradient
from flora_dist.optim.matrix import MatrixPhases
from flora_dist.optim.part import Reducer, Terms
from flora_dist.optim.pieces import work_limit
from flora_dist.optim.sketches import BatchSketches
from flora_dist.optim.vector import VectorPhases

# Torch cuts a sum that gives one number among threads from here on, and none that gives several:
# what is longer stands alone, so that its bits do not depend on what else is stepped.
LONGEST_SUM = 1 << 15
# ZeRO steps each of its groups by itself; where gradients come and go, plans are made anew.
MOST_PLANS = 64
State = Mapping[str, Any]
"""Of one parameter."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A batch, how it is stepped, and which of the step's gradients are its members'."""

    batch: Batch
    phases: Phases
    places: tuple[int, ...]
    """Of its members among those that were planned."""
    sender: Sender
    has_gradients: bool


class Plan:
    """Batches of a step, in the order of their first names, and their messages."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry.sender.names[0])
        self._messages: list[tuple[list[int], Message | None]] = []
        groups: dict[Reducer | None, list[int]] = {}
        for index, entry in enumerate(self.entries):
            groups.setdefault(entry.batch.reducer, []).append(index)
        for reducer, indices in groups.items():
            senders = [self.entries[index].sender for index in indices]
            message = None if reducer is None else Message(senders, reducer)
            self._messages.append((indices, message))

    def is_current(self, states: Sequence[State]) -> bool:
        """Whether weights, state and steps are still those that this was made for.

        ``states``: of each parameter as it is now, in the order that was planned.
        """
        for entry in self.entries:
            first = states[entry.places[0]]
            for member, place in zip(entry.batch.members, entry.places, strict=True):
                own = states[place]
                if not member.is_current(own) or not _is_as_far(own, first):
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


def _is_as_far(state: State, other: State) -> bool:
    return bool(state["step"] == other["step"] and state["window"] == other["window"])


class Plans:
    """The last plan of each selection of parameters that is stepped."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Plan] = {}

    def find(self, key: Hashable, states: Sequence[State]) -> Plan | None:
        """The plan that was kept, if it still holds."""
        plan = self._kept.get(key)
        return plan if plan is not None and plan.is_current(states) else None

    def keep(self, key: Hashable, plan: Plan) -> None:
        """Keep a plan; the oldest goes where there are many."""
        if len(self._kept) >= MOST_PLANS:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = plan


def make_plan(members: Sequence[Member], gradients: Sequence[Gradient]) -> Plan:
    """Plan a step of parameters that have state, given in an order that all ranks share."""
    alike: dict[Hashable, list[int]] = {}
    for index, (member, gradient) in enumerate(zip(members, gradients, strict=True)):
        key: Hashable = index
        if _may_stand_with_others(member, gradient):
            key = _kind(member), _here(member, gradient)
        alike.setdefault(key, []).append(index)
    entries = [
        _entry(some, members, gradients)
        for indices in alike.values()
        for some in _chunks(indices, members[indices[0]])
    ]
    return Plan(entries)


def _entry(
    indices: Sequence[int], members: Sequence[Member], gradients: Sequence[Gradient]
) -> Entry:
    own = tuple(members[index] for index in indices)
    first, sketches = own[0], [member.sketches for member in own if member.sketches is not None]
    batch = Batch(
        members=own,
        geometry=first.geometry,
        config=first.config,
        sign=-1.0 if first.group["maximize"] else 1.0,
        dtype=arithmetic_dtype(first.weight.dtype),
        device=first.weight.device,
        sketches=BatchSketches(sketches) if sketches else None,
    )
    sender = Sender(
        kind=_kind(first),
        names=tuple(member.name for member in own),
        cuts=first.cuts,
        sends_all=first.part.splits_matrices or first.geometry.is_vector,
    )
    return Entry(
        batch=batch,
        phases=VectorPhases(batch) if first.geometry.is_vector else MatrixPhases(batch),
        places=tuple(indices),
        sender=sender,
        has_gradients=gradients[indices[0]] is not None,
    )


def _kind(member: Member) -> Hashable:
    """What parameters of a batch, and of a stretch of a message, have in common on all ranks."""
    part, cuts = member.part, member.cuts
    return (
        member.geometry,
        member.config,
        id(member.group),
        member.group["maximize"],
        member.weight.dtype,
        part.reducer,
        part.splits_matrices,
        cuts.rows_anywhere,
        cuts.blocks_anywhere,
        cuts.peers is None,
        member.state["step"],
        member.state["window"],
    )


def _here(member: Member, gradient: Gradient) -> Hashable:
    """What they have in common on this rank besides."""
    return (
        member.tiles,
        member.part.matrices,
        member.weight.device,
        isinstance(gradient, SketchedGradient),
        tuple((name, tuple(t.shape), t.dtype) for name, t in member.local.items()),
    )


def _may_stand_with_others(member: Member, gradient: Gradient) -> bool:
    size, tiles, part = member.geometry, member.tiles, member.part
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
        and (member.sketches is None or member.sketches.is_small)
    )


def _chunks(indices: Sequence[int], first: Member) -> Sequence[Sequence[int]]:
    """Vectors are stepped whole: as many together as make a piece of work. Matrices are cut."""
    if not first.geometry.is_vector:
        return [indices]
    count = max(1, work_limit(first.weight.device) // max(1, first.weight.numel()))
    return [indices[start : start + count] for start in range(0, len(indices), count)]
