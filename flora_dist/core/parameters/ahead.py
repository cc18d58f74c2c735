# SPDX-License-Identifier: Apache-2.0
"""Parameters that are stepped during backward, ahead of the ``step()`` that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flora_dist.core.parameters.trainable import Trainable


@dataclass(eq=False)
class Ahead:
    """What of an optimizer has been stepped since its last ``step()``."""

    is_attached: bool = False
    """Whether gradients are gone before ``step()``."""
    tensor_ids: set[int] = field(default_factory=set)
    """Of what has been stepped; the model holds the tensors."""

    def left_of(self, slots: Sequence[Trainable]) -> list[Trainable]:
        """Those that ``step()`` still has to step."""
        return [slot for slot in slots if id(slot.tensor) not in self.tensor_ids]

    def take(self, slots: Sequence[Trainable]) -> None:
        """Note what is stepped now.

        Raises:
            ValueError: a group would skip the step of all parameters for one gradient.
        """
        skipping = next((slot.name for slot in slots if slot.config.skip_nonfinite), None)
        if skipping is not None:
            raise ValueError(
                "skip_nonfinite skips the whole step for one bad gradient, and in backward others "
                f"have been stepped by then; the group of {skipping!r} has skip_nonfinite=True. "
                "Set it to False, or do not call step_in_backward()."
            )
        self.tensor_ids.update(id(slot.tensor) for slot in slots)

    def check_whole(self) -> None:
        """Refuse to look at all gradients at once.

        Raises:
            RuntimeError: each is freed as soon as it has been stepped.
        """
        if self.is_attached:
            raise RuntimeError(
                "with step_in_backward() each gradient is stepped and freed before the next is "
                "there, so nothing has the norm of all of them. Rely on the optimizer's clip or "
                "growth, which go by matrix, or do not call step_in_backward()."
            )
