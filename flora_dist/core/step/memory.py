# SPDX-License-Identifier: Apache-2.0
"""Whether weights and state are still where they were when a step was planned.

Every step asks, for every parameter: so each question is asked of all of them in one list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from flora_dist.core.step.batch import Member


class Memory:
    """The state's dicts, the tensors in them, and the addresses of all, of some members."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._tensors = [member.tensor for member in members]
        self._owners = [(member.layout.state_of, member.part) for member in members]
        self._states = [member.state for member in members]
        names = dict.fromkeys(name for member in members for name in member.kept)
        self._kept = {
            name: ([m.state for m in own], [m.kept[name] for m in own])
            for name in names
            for own in ([member for member in members if name in member.kept],)
        }
        self._local = [tensor for member in members for tensor in member.local.values()]
        self._local_addresses = [a for member in members for a in member.local_addresses]
        self._parts = [member.part for member in members]
        self._addresses = [member.address for member in members]

    def is_as_it_was(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the state holds the same tensors, and all memory is that of then."""
        find, nothing = state.get, dict[str, Any]()
        owned = [
            state_of(find(tensor, nothing), part)
            for tensor, (state_of, part) in zip(self._tensors, self._owners, strict=True)
        ]
        return (
            all(map(is_, owned, self._states))
            and all(
                all(map(is_, [own.get(name) for own in states], tensors))
                for name, (states, tensors) in self._kept.items()
            )
            and [tensor.data_ptr() for tensor in self._local] == self._local_addresses
            and [part.address() for part in self._parts] == self._addresses
        )
