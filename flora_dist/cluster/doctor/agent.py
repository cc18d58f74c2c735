# SPDX-License-Identifier: Apache-2.0
"""What the doctor may ask of a host: its facts, ports, a measurement, ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flora_dist.cluster.doctor.children import Children
from flora_dist.cluster.doctor.facts import as_tree
from flora_dist.cluster.doctor.host_facts import look
from flora_dist.cluster.doctor.links import Listener, measure
from flora_dist.cluster.launch.far_end import Voice, serve


class DoctorAgent:
    """What is held open between questions."""

    def __init__(self, _voice: Voice) -> None:
        self.listener: Listener | None = None
        self.children = Children()

    def listen(self, address: str, ports: list[int], token: str) -> list[int | str]:
        """Open ports, 0 for any; each one's number, or why it cannot be opened.

        ``address``: the one at which to listen; empty: all.
        """
        self.listener = Listener(token, address)
        return [self.listener.open(port) for port in ports]

    def close(self) -> None:
        """Close them."""
        if self.listener is not None:
            self.listener.close()

    def end(self) -> None:
        """End the ranks, and start none any more."""
        self.children.end()

    def asks(self) -> Mapping[str, Callable[..., Any]]:
        """By name, what may be asked."""
        return {
            "facts": lambda **what: as_tree(look(**what)),
            "listen": self.listen,
            "close": self.close,
            "measure": measure,
            "ranks": self.children.run,
            "stop": self.end,
        }


if __name__ == "__main__":
    serve(DoctorAgent)
