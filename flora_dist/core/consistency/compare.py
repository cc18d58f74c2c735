# SPDX-License-Identifier: Apache-2.0
"""Ranks compare what must be equal on all of them, in one all-reduce of 4176 bytes.

Names, seed, settings, level and steps travel as 62 bits of SHA-256, statistics as fingerprints of
their bits: the smallest over the ranks of h and of ~h, which belong together where all agree. Only
ranks that differ then say more. A check reads up to 128 parameters, and 65536 elements of a tensor;
which ones depends on the step, so that later checks read the others.

Shape suffix: S numbers in a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flora_dist.core.comm.groups import (
    GroupReducer,
    Peers,
    gather,
    has_peers,
    place_of,
    process_rank,
    smallest,
)
from flora_dist.core.consistency.disagreement import Field, Said, complaint
from flora_dist.core.consistency.fingerprints import (
    WIDTH,
    Sample,
    chunk,
    draw,
    fingerprints,
    numbers_of,
)
from flora_dist.core.parameters.registry import Registry
from flora_dist.core.parameters.source import GradientSource
from flora_dist.core.parameters.trainable import Group, Trainable
from flora_dist.core.state.settings import KNOBS
from flora_dist.core.state.spec import matrix_sizes

FIELDS = ("names", "seed", "settings", "level", "steps")
"""What is compared besides statistics, in the order of cause and effect."""
_SETTINGS = tuple(knob for knob in KNOBS if knob != "seed")
_RATES = ("lr", "weight_decay")
MOST_PARAMETERS = 128
MOST_SAID = 8
"""Statistics that ranks tell each other of once some differ; the first is named."""
_NOBODY = torch.iinfo(torch.int64).max
"""Fingerprint of what a rank does not hold; others have 62 bits, so that neither h nor ~h is it."""
State = Mapping[Tensor, dict[str, Any]]


class Compared(Protocol):
    """The parts of an optimizer that are compared."""

    @property
    def param_groups(self) -> list[Group]:
        """Settings, and what stands in the groups now."""

    @property
    def state(self) -> State:
        """This rank's state."""

    @property
    def roster(self) -> Registry:
        """What the groups hold at a step."""

    @property
    def gradients(self) -> GradientSource:
        """Where a step takes its gradients from."""


class Rhythm:
    """Counts whole steps, and lets ranks compare after every so many of them."""

    def __init__(self, every: int | None) -> None:
        """``every``: steps from one comparison to the next; None: never.

        Raises:
            ValueError: not a whole number above 0.
        """
        if every is not None and not (type(every) is int and every > 0):
            raise ValueError(
                f"check_every must be a whole number of at least 1; got {every!r}. Pass 1 or "
                "more, or None to never compare."
            )
        self.every, self._taken = every, 0
        # Stages 1 and 2 of ZeRO show a step no group but the one whose turn it is.
        self._groups: dict[int, Group] = {}

    def count(self, optimizer: Compared, slots: Sequence[Trainable]) -> None:
        """``slots`` have been stepped; compare if that ends a step that is due.

        Raises:
            ValueError: on every rank, if ranks differ.
        """
        if self.every is None:
            return
        self._groups.update({id(group): group for group in optimizer.param_groups})
        turns, state = optimizer.roster.turns, optimizer.state
        if turns and not any(slot.tensor is turns[-1] for slot in slots):
            return
        groups = list(self._groups.values())
        self._groups.clear()
        # Not by the counters of the state: ranks that differ there would compare at other times,
        # and wait forever. But torch's DCP makes state in a step that counts nothing.
        if any(slot.next_step(state.get(slot.tensor, {})) > 1 for slot in slots):
            self._taken += 1
            if self._taken % self.every == 0:
                check(optimizer, None, groups=groups)


def check(
    optimizer: Compared,
    peers: Peers,
    *,
    groups: Sequence[Group] | None = None,
    asked: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to go on if ranks differ; every rank among ``peers`` calls this.

    Args:
        optimizer: of this rank.
        peers: whom to compare with.
        groups: all parameter groups, where the optimizer shows but some.
        asked: the level that is about to be attached, in place of the one that is.

    Raises:
        ValueError: on every rank, naming the field and the ranks that differ from most.
    """
    if not has_peers():
        return
    # Not configured: a rank whose settings do not fit its state must not raise alone.
    groups = optimizer.roster.filled(optimizer.param_groups if groups is None else groups)
    slots = optimizer.roster.fresh(groups, optimizer.state)
    by_name = {slot.part.name: slot for slot in slots}
    fields = _fields(by_name, optimizer)
    if asked is not None:
        fields["level"] = {"": asked}
    samples = list(_samples(by_name, optimizer.state))
    differing = _compare([_digest(fields[field]) for field in FIELDS], samples, peers)
    if not differing:
        return
    unlike = [field for field in FIELDS if FIELDS.index(field) in differing]
    places = [index - len(FIELDS) for index in differing if index >= len(FIELDS)]
    if "names" in unlike or "steps" in unlike:  # each rank has picked others
        places = []
    index_of = {id(group): index for index, group in enumerate(groups)}
    said = Said(
        rank=process_rank(),
        fields={field: fields[field] for field in unlike},
        statistics=numbers_of([samples[place] for place in places[:MOST_SAID]]),
        groups={name: index_of[id(slot.group)] for name, slot in by_name.items()},
    )
    raise ValueError(complaint(gather(said, peers)))


# ---- what each rank has


def _fields(by_name: Mapping[str, Trainable], optimizer: Compared) -> dict[str, Field]:
    settings: dict[int, Mapping[str, Any]] = {}
    for slot in by_name.values():
        if id(slot.group) not in settings:
            settings[id(slot.group)] = _settings_of(slot.group)
    states = {n: s.own_state(optimizer.state.get(s.tensor, {})) for n, s in by_name.items()}
    return {
        "names": {
            name: {"shape": str(slot.part.shape), "requires_grad": slot.part.trains}
            for name, slot in by_name.items()
        },
        "seed": {name: {"seed": slot.group["seed"]} for name, slot in by_name.items()},
        "settings": {name: settings[id(slot.group)] for name, slot in by_name.items()},
        "level": _level_of(optimizer),
        "steps": {
            name: {key: own.get(key) for key in ("step", "window")}
            for name, own in states.items()
            if "step" in own
        },
    }


def _settings_of(group: Group) -> dict[str, Any]:
    rates = {name: float(group[name]) for name in _RATES}
    return {**rates, "maximize": group["maximize"], **{name: group[name] for name in _SETTINGS}}


def _level_of(optimizer: Compared) -> Field:
    settings = optimizer.gradients.settings()
    whole = {"gradients": optimizer.roster.level, **settings.get("", {})}
    return {**settings, "": whole}


def _digest(field: Field) -> int:
    """62 bits of a field, whatever the order of its parameters."""
    # Parameters of one group share their settings: thousands of texts would be the same.
    texts: dict[int, bytes] = {}
    digest = hashlib.sha256()
    for name in sorted(field):
        values = field[name]
        if id(values) not in texts:
            texts[id(values)] = json.dumps(values, sort_keys=True, default=str).encode()
        digest.update(f"{name}\0".encode() + texts[id(values)])
    return int.from_bytes(digest.digest()[:8], "big") & ((1 << WIDTH) - 1)


# ---- statistics


def _samples(by_name: Mapping[str, Trainable], state: State) -> Iterator[tuple[str, Sample]]:
    """Two of each parameter that is read this time, held or not: equal places on all ranks."""
    turn = max((slot.next_step(state.get(slot.tensor, {})) for slot in by_name.values()), default=0)
    # FSDP1 does not sum the gradients of parameters that it ignores: they are plain among spans.
    has_spans = any(isinstance(slot.part.reducer, GroupReducer) for slot in by_name.values())
    for name in _pick(sorted(by_name), MOST_PARAMETERS, turn):
        slot = by_name[name]
        own = slot.own_state(state.get(slot.tensor, {}))
        is_alone = has_spans and slot.part.reducer is None
        held = {} if is_alone or "step" not in own else own
        yield name, _column(slot, held, turn)
        yield name, _piece(slot, held, turn)


def _column(slot: Trainable, own: Mapping[str, Any], turn: int) -> Sample:
    """Column means of one matrix, which are equal on all ranks that hold some of it."""
    if "column" not in own:
        return {}
    count = matrix_sizes(slot.part.shape)[0]
    matrix = draw(turn, "matrix") % count
    first, last = slot.part.matrices
    if not first <= matrix < last:
        return {}
    column_M = slot.part.local(own["column"]).reshape(last - first, -1)[matrix - first]
    return {"column" if count == 1 else f"column {matrix}": chunk(column_M, turn)}


def _piece(slot: Trainable, own: Mapping[str, Any], turn: int) -> Sample:
    """All that replicas of one shard have, the weight too; the whole parameter is one shard."""
    place, count = place_of(slot.part.reducer)
    if not own or place != draw(turn, "place") % count:
        return {}
    kept = {key: value for key, value in sorted(own.items()) if isinstance(value, Tensor)}
    kept.pop("column", None)
    local = {key: slot.part.local(value) for key, value in kept.items()}
    return {k: chunk(v, turn) for k, v in {**local, "weight": slot.part.weight()}.items()}


def _pick(names: Sequence[str], most: int, turn: int) -> Iterator[str]:
    first = draw(turn, "parameters")
    for index in range(min(most, len(names))):
        yield names[(first + index) % len(names)]


# ---- comparing


def _compare(
    digests: Sequence[int], samples: Sequence[tuple[str, Sample]], peers: Peers
) -> list[int]:
    """Indices, of the digests and then of the samples, where ranks differ."""
    width = len(digests) + 2 * MOST_PARAMETERS
    held = {len(digests) + i: sample for i, (_, sample) in enumerate(samples) if sample}
    prints_S = fingerprints([*held.values()])
    both_2S = torch.full((2, width), _NOBODY, dtype=torch.int64, device=prints_S.device)
    both_2S[:, list(held)] = torch.stack([prints_S, ~prints_S])
    known = torch.tensor(digests, dtype=torch.int64)
    both_2S[:, : len(digests)] = torch.stack([known, ~known]).to(both_2S.device)
    lowest, complements = smallest(both_2S.view(-1), peers).view(2, width).tolist()
    pairs = enumerate(zip(lowest, complements, strict=True))
    return [i for i, (low, other) in pairs if low != _NOBODY and low != ~other]
