# SPDX-License-Identifier: Apache-2.0
"""Bytes of all tensors that are alive, and their peak, counted at every operator.

Not what an allocator takes from the system: no rounding up, no fragments, no workspace inside a
kernel. Sizes are read anew each time, since FSDP2 frees and refills a storage in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flora_dist.core.layouts.dtensor import local_of
from flora_dist.gradients.placeholder import CompressedGradient, stands_in


class LiveBytes(TorchDispatchMode):
    """Watches what operators return while it is entered.

    >>> weight = torch.zeros(10)
    >>> with LiveBytes(known=[weight]) as live:
    ...     kept = weight + 1
    ...     gone = (kept * 2).sum()
    >>> live.peak, live.now()
    (84, 44)
    """

    def __init__(self, *, known: Iterable[Tensor] = ()) -> None:
        """``known``: tensors that do not count, such as parameters, whatever size they take."""
        super().__init__()
        self._known = set(map(_storage_of, known))
        self._seen: dict[int, ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def now(self) -> int:
        """Bytes alive of what was seen."""
        total = 0
        for key, seen in list(self._seen.items()):
            storage = seen()
            if storage is None:
                del self._seen[key]
            else:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if CompressedGradient in types:
            return NotImplemented  # adding to it adds to sketches: those operators come by later
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and not stands_in(leaf):  # that claims a size it has not
                storage = _storage_of(leaf)
                if storage not in self._known:
                    # Over what may stand there: one that is gone, and had the same id.
                    self._seen[id(storage)] = ref(storage)
        self.peak = max(self.peak, self.now())
        return found


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return local_of(tensor).untyped_storage()
