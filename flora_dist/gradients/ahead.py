# SPDX-License-Identifier: Apache-2.0
"""Sketches that are sent while backward goes on: when, and what becomes of them if it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flora_dist.gradients.average import Averaging
from flora_dist.gradients.flow import Flow
from flora_dist.gradients.placeholder import is_shown
from flora_dist.gradients.wear import warn_of_wear


class SentAhead:
    """The sketches of one optimizer that have been sent and whose mean nobody has asked for yet."""

    def __init__(
        self, flows: Sequence[Flow], averaging: Averaging, is_last: Callable[[], bool]
    ) -> None:
        """Nothing has been sent.

        Args:
            flows: in the order of ``averaging``.
            averaging: their mean.
            is_last: whether gradients that arrive now are of the last micro-batch before the step.
        """
        self._flows, self._averaging, self._is_last = flows, averaging, is_last
        self._places = {flow.part.name: place for place, flow in enumerate(flows)}

    @property
    def is_under_way(self) -> bool:
        """Whether anything has been sent."""
        return self._averaging.is_under_way

    def arrived(self, flow: Flow) -> None:
        """A backward has added to a parameter's sketches."""
        if not self._is_last():
            return
        if not self.is_under_way:  # afterwards nothing is left that could be counted
            warn_of_wear([flow.accumulator])
        self._averaging.arrived(self._places[flow.part.name])

    def check_open(self, flow: Flow) -> None:
        """Refuse a gradient whose sketch has been sent.

        Raises:
            RuntimeError: naming the parameter.
        """
        if self._averaging.has_sent(self._places[flow.part.name]):
            raise RuntimeError(
                "with bucket_cap_mb the last backward before a step sends sketches as they are "
                f"complete; a gradient of {flow.part.name!r} came after its own was sent. Put all "
                "micro-batches but the last in no_sync(), or under FSDP2 in "
                "set_requires_gradient_sync(False); or leave bucket_cap_mb out."
            )

    def check_kept(self) -> None:
        """Drop what was sent if all gradients have been zeroed since.

        Raises:
            RuntimeError: some have been; they cannot be taken back.
        """
        if not self.is_under_way:
            return
        shown = [flow for flow in self._flows if flow.source.visible is not None]
        zeroed = [
            flow
            for flow in shown
            if not is_shown(flow.source.visible)
            and self._averaging.has_sent(self._places[flow.part.name])
        ]
        if zeroed and not any(is_shown(flow.source.visible) for flow in shown):
            self.drop()
        elif zeroed:
            raise RuntimeError(
                "with bucket_cap_mb gradients are sent during the last backward and can only be "
                f"zeroed all together; that of {zeroed[0].part.name!r} was, and others were not. "
                "Call optimizer.zero_grad(), or leave bucket_cap_mb out."
            )

    def drop(self) -> None:
        """Forget it, together with what has not been sent; nothing where nothing has been.

        All ranks must call this whose backward has failed, or whose gradients were zeroed.
        """
        if self.is_under_way:
            for flow in self._flows:
                flow.accumulator.drop()
            self._averaging.drop()
