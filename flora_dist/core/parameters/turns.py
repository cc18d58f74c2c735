# SPDX-License-Identifier: Apache-2.0
"""Optimizers without names that take turns: their positions coincide, and so do random numbers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import ref

import torch

from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.state.spec import has_momentum

DrawKey = tuple[int, str]
"""A seed and a position, from which random numbers are derived."""
_LOW = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Player:
    """One optimizer among those of this process."""

    lineage: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Equal for copies, which are no other parts of a model but the same again."""
    places: set[DrawKey] = field(default_factory=set)
    """What it has stepped."""

    def copy(self) -> Player:
        """Of a copy of the optimizer, which has stepped nothing yet."""
        return Player(lineage=self.lineage)


@dataclass(frozen=True, slots=True)
class _Turn:
    """Who has stepped a place last, and which tensor stood there."""

    player: ref[Player]
    tensor_id: int


_last: dict[DrawKey, _Turn] = {}


def take_turn(player: Player, slots: Sequence[Trainable]) -> None:
    """Refuse to step again what another optimizer has stepped other parameters of meanwhile.

    A new optimizer may follow an old one, which nobody steps any more. Two that take turns are
    parts of one training run, say one for each parameter.

    Raises:
        ValueError: nothing of this step has changed.
    """
    places = {(slot.config.seed, slot.part.name): slot for slot in slots if _draws(slot)}
    for place, slot in places.items():
        turn = _last.get(place)
        other = None if turn is None else turn.player()
        if turn is None or other is None or other.lineage == player.lineage:
            continue
        is_back = place in player.places or hasattr(slot.tensor, "_in_backward_optimizers")
        if is_back and turn.tensor_id != id(slot.tensor):
            raise ValueError(
                "optimizers that take turns must be given names: without them each counts its "
                f"parameters from {slot.part.name!r} or before, and all would have the same random "
                "matrices and roundings. Give each of them (name, parameter) pairs of "
                "model.named_parameters(), or another seed. torch's _apply_optimizer_in_backward "
                "can do neither: step in hooks of your own."
            )
    for place, slot in places.items():
        _last[place] = _Turn(ref(player), id(slot.tensor))
    player.places.update(places)


def _draws(slot: Trainable) -> bool:
    """Whether a parameter without a name uses random numbers."""
    config = slot.config
    if slot.position is None:
        return False
    moves = has_momentum(slot.geometry, config)
    rounds = slot.tensor.dtype in _LOW or (moves and config.state_dtype == "bfloat16")
    is_sketched = moves and slot.geometry.rank is not None
    return is_sketched or (rounds and config.stochastic_rounding)
