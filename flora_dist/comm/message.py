# SPDX-License-Identifier: Apache-2.0
"""Terms of many parameters packed in one flat message, summed, and handed back.

The layout of a message is the order of the terms given, which callers derive from parameter names:
ranks agree on it without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flora_dist.optim.part import Reducer, Terms


def sum_terms(terms: Sequence[Terms], reducer: Reducer | None) -> list[Terms]:
    """Sum terms over the ranks of ``reducer``: one message, none if it is None or all is empty.

    Args:
        terms: one dict per parameter; names, shapes and order equal on all ranks.
        reducer: who holds the other parts; None: nobody, the terms are the sums.

    Returns:
        The sums, with the names, shapes, dtypes and devices of ``terms``.
    """
    values = [value for parameter in terms for value in parameter.values()]
    if reducer is None or not values:
        return [dict(parameter) for parameter in terms]
    # Parameters of several dtypes share the message: the widest loses nothing.
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    device = values[0].device
    message_S = torch.cat([value.reshape(-1).to(device=device, dtype=dtype) for value in values])
    reducer.sum_(message_S)
    sums, start = [], 0
    for parameter in terms:
        total: dict[str, Tensor] = {}
        for name, value in parameter.items():
            stop = start + math.prod(value.shape)
            total[name] = message_S[start:stop].view(value.shape).to(value)
            start = stop
        sums.append(total)
    return sums
