# SPDX-License-Identifier: Apache-2.0
"""Random bits on CPUs by the compiled kernels, where torch makes a hundred passes of int64."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_dist.core.sketch.philox import Counters, drawn_by_torch
from flora_dist.kernels.library import found


def drawn(counters: Counters, device: torch.device) -> Tensor:
    """``Drawer``: the bits of ``drawn_by_torch``."""
    operators = found().operators
    if operators is None:
        return drawn_by_torch(counters, device)
    shape = len(counters.keys), counters.rows, counters.count, 4
    words = torch.empty(shape, dtype=torch.int32, device=device)
    keys = [key - (1 << 64) if key >> 63 else key for key in counters.keys]
    operators.random_words(keys, counters.first, counters.stride, int(counters.stream), words)
    return words.view(-1, 4).view(torch.int64)
