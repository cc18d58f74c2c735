# SPDX-License-Identifier: Apache-2.0
"""A step, planned once: which parameters are stepped together, and where their sums travel.

A plan holds until something structural changes: which parameters take part and have gradients,
their settings, their memory, their steps. Parameters stand together where nothing but their memory
differs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from flora_dist.core.comm.message import Message, Sender, exchange_rows_, summing
from flora_dist.core.protocols import Reducer, Terms
from flora_dist.core.step.basis import BatchSketches
from flora_dist.core.step.batch import Across, AtOnce, Batch, Member, Phases, arithmetic_dtype
from flora_dist.core.step.gradient import Gradient, SketchedGradient
from flora_dist.core.step.memory import Memory
from flora_dist.core.step.momentum_rules import (
    AdEMAMixRule,
    BlendRule,
    SubspaceAdamRule,
    rule_of,
)
from flora_dist.core.step.views import work_limit

_WEIGHED = BlendRule | AdEMAMixRule | SubspaceAdamRule
# Torch cuts a sum that gives one number among threads from here on, and none that gives several:
# what is longer stands alone, so that its bits do not depend on what else is stepped.
LONGEST_SUM = 1 << 15
# ZeRO steps each of its groups by itself, a step in backward each parameter: of a network of 100
# layers about a thousand. Where gradients come and go, plans are made anew.
MOST_PLANS = 4096
State = Mapping[Tensor, dict[str, Any]]
PhasesOf = Callable[[Batch, Gradient], Phases]
AtOnceOf = Callable[[Sequence[Phases]], AtOnce | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A batch, how it is stepped, and which of the step's gradients are its members'."""

    batch: Batch
    phases: Phases
    places: tuple[int, ...]
    """Of its members among those that were planned."""
    sender: Sender
    has_gradients: bool
    exchanges_rows: bool
    """Whether ranks that share its cut rows give them to each other before message 1."""


class Plan:
    """Batches of a step, in the order of their first names, and their messages."""

    def __init__(
        self, entries: Sequence[Entry], kinds: Sequence[type], at_once_of: AtOnceOf
    ) -> None:
        """``kinds``: what each gradient is that was planned for: a tensor, sketched, or None.

        ``at_once_of``: a way to step batches of these phases in one go, if there is one.
        """
        self._at_once_of = at_once_of
        self.kinds = list(kinds)
        self.entries = sorted(entries, key=lambda entry: entry.sender.names[0])
        self._states = [[m.state for m in entry.batch.members] for entry in self.entries]
        self._memory = Memory([m for entry in self.entries for m in entry.batch.members])
        self._messages: list[tuple[list[int], Message | None]] = []
        groups: dict[Reducer | None, list[int]] = {}
        for index, entry in enumerate(self.entries):
            groups.setdefault(entry.batch.reducer, []).append(index)
        for reducer, indices in groups.items():
            senders = [self.entries[index].sender for index in indices]
            message = None if reducer is None else Message(senders, reducer)
            self._messages.append((indices, message))
        self.exchanges_rows = any(entry.exchanges_rows for entry in self.entries)
        self._is_local = all(entry.batch.reducer is None for entry in self.entries)

    @cached_property
    def at_once(self) -> AtOnce | None:
        """The step by one call, where no sums travel."""
        return self._find_at_once() if self._is_local else None

    @cached_property
    def across(self) -> Across | None:
        """The step by two calls, where one message is enough; made at the first one that asks."""
        at_once = None if self._is_local else self._find_at_once()
        return None if at_once is None else at_once.across()

    @cached_property
    def _sums(self) -> list[Callable[[], None]]:
        assert self.across is not None
        return self._summing(self.across.terms)

    def _find_at_once(self) -> AtOnce | None:
        """A way to step all batches together; None where something is asked between phases."""
        entries = self.entries
        if not all(entry.has_gradients for entry in entries):
            return None
        if any(entry.batch.config.skip_nonfinite for entry in entries):
            return None
        return self._at_once_of([entry.phases for entry in entries])

    def is_current(self, state: State) -> bool:
        """Whether weights, state and steps are still those that this was made for."""
        if not self._memory.is_as_it_was(state):
            return False
        return all(map(_are_level, self._states))

    def without(self, absent: set[int]) -> Plan:
        """The same without some of the entries."""
        kept = [entry for index, entry in enumerate(self.entries) if index not in absent]
        return Plan(kept, self.kinds, self._at_once_of)

    def exchange_(self, terms: Sequence[Terms]) -> None:
        """Make cut rows whole that a few ranks share, before message 1."""
        for indices, message in self._messages:
            exchange_rows_([terms[index] for index in indices], message)

    def sum_(self, terms: Sequence[Terms]) -> None:
        """Replace each batch's terms by their sums over its ranks: a message per group of ranks."""
        for sum_ in self._summing(terms):
            sum_()

    def sum_across_(self) -> None:
        """The same of the terms of ``across``."""
        for sum_ in self._sums:
            sum_()

    def _summing(self, terms: Sequence[Terms]) -> list[Callable[[], None]]:
        return [
            summing([terms[index] for index in indices], message)
            for indices, message in self._messages
        ]


def _are_level(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the members of a batch have come as far as each other."""
    steps, windows = [own["step"] for own in states], [own["window"] for own in states]
    return steps.count(steps[0]) == len(steps) and windows.count(windows[0]) == len(windows)


class Plans:
    """The last plan of each selection of parameters that is stepped."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Plan] = {}

    def find(self, key: Hashable, state: State) -> Plan | None:
        """The plan that was kept, if it still holds."""
        plan = self._kept.get(key)
        return plan if plan is not None and plan.is_current(state) else None

    def keep(self, key: Hashable, plan: Plan) -> None:
        """Keep a plan; the oldest goes where there are many."""
        if len(self._kept) >= MOST_PLANS:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = plan


def make_plan(
    members: Sequence[Member],
    gradients: Sequence[Gradient],
    phases_of: PhasesOf,
    at_once_of: AtOnceOf,
) -> Plan:
    """Plan a step of parameters that have state, given in an order that all ranks share.

    ``phases_of``: how a batch is stepped, given the kind of its gradients by the first one.
    ``at_once_of``: how all are, in one go.
    """
    alike: dict[Hashable, list[int]] = {}
    for index, (member, gradient) in enumerate(zip(members, gradients, strict=True)):
        key: Hashable = index
        if _may_stand_with_others(member, gradient):
            key = _kind(member), _here(member, gradient)
        alike.setdefault(key, []).append(index)
    entries = [
        _entry(some, members, gradients, phases_of)
        for indices in alike.values()
        for some in _chunks(indices, members[indices[0]])
    ]
    return Plan(entries, [type(gradient) for gradient in gradients], at_once_of)


def _entry(
    indices: Sequence[int],
    members: Sequence[Member],
    gradients: Sequence[Gradient],
    phases_of: PhasesOf,
) -> Entry:
    own = tuple(members[index] for index in indices)
    first = own[0]
    batch = _batch(own)
    sender = Sender(
        kind=_kind(first),
        names=tuple(member.name for member in own),
        cuts=first.cuts,
        sends_all=first.part.splits_matrices or first.geometry.is_vector,
    )
    return Entry(
        batch=batch,
        phases=phases_of(batch, gradients[indices[0]]),
        places=tuple(indices),
        sender=sender,
        has_gradients=gradients[indices[0]] is not None,
        exchanges_rows=first.cuts.peers is not None and first.cuts.rows_anywhere,
    )


def _batch(members: tuple[Member, ...]) -> Batch:
    first = members[0]
    size, splits = first.geometry, first.part.splits_matrices
    rule = rule_of(first.config, size)
    sketches = [member.sketches for member in members if member.sketches is not None]
    here = first.matrices[1] - first.matrices[0]
    is_part = len(members) == 1 and splits
    sources, offset = [], 0
    for tile in first.tiles:
        sources.append((offset, tile.sizes))
        offset += tile.num_elements
    return Batch(
        members=members,
        geometry=size,
        config=first.config,
        sign=-1.0 if first.group["maximize"] else 1.0,
        dtype=arithmetic_dtype(first.weight.dtype),
        device=first.weight.device,
        sketches=BatchSketches(sketches) if sketches else None,
        reducer=first.part.reducer,
        sources=tuple(sources),
        matrices_here=here,
        matrices_summed=size.num_matrices if splits else here,
        held=slice(*first.matrices) if is_part else slice(0, len(members) * here),
        elements_per_matrix=size.num_rows * size.num_columns,
        gain=rule.gain if isinstance(rule, _WEIGHED) else 1.0,
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
        cuts.are_few,
        member.state["step"],
        member.state["window"],
    )


def _here(member: Member, gradient: Gradient) -> Hashable:
    """What they have in common on this rank besides."""
    return (
        member.tiles,
        member.matrices,
        member.weight.device,
        isinstance(gradient, SketchedGradient),
        tuple((name, tuple(t.shape), t.dtype) for name, t in member.local.items()),
    )


def _may_stand_with_others(member: Member, gradient: Gradient) -> bool:
    size, tiles, part = member.geometry, member.tiles, member.part
    if not tiles:  # nothing to step: under ZeRO most parameters of each rank are such
        return gradient is not None
    first, last = member.matrices
    is_cut = bool(tiles) and tiles[0].columns != (0, size.num_columns) and not size.is_vector
    shares_cuts = member.cuts.peers is not None and len(member.cuts.rows) > 0
    longest = max(max(tile.sizes[1:]) for tile in tiles)
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
