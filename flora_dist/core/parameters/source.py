# SPDX-License-Identifier: Apache-2.0
"""Where the gradients of a step come from: what stands in ``.grad``, or sketches kept since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.state.spec import LEVELS
from flora_dist.core.step.gradient import Gradient


class GradientSource(Protocol):
    """Gives each step its gradients."""

    level: str
    """Of ``LEVELS``: what of the gradients is compressed."""

    @property
    def is_open(self) -> bool:
        """Whether something has come in since the last step that a checkpoint would lose."""

    def check(self, slots: Sequence[Trainable]) -> None:
        """Refuse gradients that cannot be stepped, before anything is sent."""

    def read(self, slots: Sequence[Trainable]) -> list[Gradient]:
        """The gradient of each slot; every rank calls this, before there is state.

        Raises:
            ValueError, TypeError: a layout cannot read a parameter's, which is named.
        """

    def read_ahead(self, slots: Sequence[Trainable]) -> list[Gradient]:
        """The same of some slots, before the others' gradients are complete."""

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """What ranks must agree on besides the level: of all under "", or by parameter."""

    def forget(self) -> None:
        """Drop what came in: the step is done."""


class DenseGradients:
    """What autograd, or the framework, has left in ``.grad``."""

    level = LEVELS[0]

    @property
    def is_open(self) -> bool:
        """Never: nothing is kept outside of ``.grad``."""
        return False

    def check(self, slots: Sequence[Trainable]) -> None:
        """Nothing: ``read`` refuses what a layout cannot read."""

    def read(self, slots: Sequence[Trainable]) -> list[Gradient]:
        """This rank's elements of each slot's gradient."""
        return [slot.stepped.gradient() for slot in slots]

    def read_ahead(self, slots: Sequence[Trainable]) -> list[Gradient]:
        """Likewise: each stands by itself."""
        return self.read(slots)

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Nothing but the level."""
        return {}

    def forget(self) -> None:
        """Nothing: ``zero_grad()`` is the user's."""
