# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels step. Imports no Triton: machines without it ask too."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.batch import Batch, arithmetic_dtype
from flora_dist.core.step.gradient import Gradient
from flora_dist.core.step.momentum_rules import BlendRule, FloraRule, FloraStrictRule, rule_of
from flora_dist.kernels.tables import DTYPES, beyond_kernels

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Below, products have no instruction; above, a block does not fit in a program's registers."""
LARGEST_RANK = 64
MOST_MATRICES = 65535
"""Of a batch that one launch steps: CUDA's limit."""


def why_not(batch: Batch, gradient: Gradient) -> str:
    """Why a batch takes torch's operators; empty where the kernels step it."""
    if not isinstance(gradient, torch.Tensor):
        return "no gradient here" if gradient is None else "sketched gradients"
    first = batch.members[0]
    reason = why_not_of(batch.geometry, batch.config, first.weight.dtype)
    if not reason and not batch.geometry.is_vector and first.cuts.rows_anywhere:
        reason = CUT_ROWS
    if len(batch.members) * max(1, batch.matrices_here) > MOST_MATRICES:
        reason = f"more than {MOST_MATRICES:,} matrices of one shape"
    return reason or _why_not_there(batch)


CUT_ROWS = "rows that several ranks hold pieces of"


def why_not_of(size: Geometry, config: FloraConfig, dtype: torch.dtype) -> str:
    """The same of a parameter's shape and settings."""
    rule = rule_of(config, size)
    if rule is not None and not isinstance(rule, BlendRule | FloraRule | FloraStrictRule):
        return f"momentum={config.momentum!r}"
    if not size.is_vector and (beyond := next(_beyond(config), "")):
        return beyond
    if (config.state_bits or 32) < 16 and rule is not None and size.rank is not None:
        return f"state_bits={config.state_bits}"
    if arithmetic_dtype(dtype) != torch.float32 or dtype not in DTYPES:
        return str(dtype)
    if rule is not None and size.rank is not None:
        is_block = size.block.bit_count() == 1 and SMALLEST_BLOCK <= size.block <= LARGEST_BLOCK
        if not is_block or size.rank > LARGEST_RANK:
            return f"rank {size.rank} per block of {size.block}"
    return ""


def _beyond(config: FloraConfig) -> Iterator[str]:
    """Settings that step matrices by torch's operators, as they are written."""
    yield from beyond_kernels(config)
    if config.growth is not None:
        yield f"growth={config.growth}"
    if config.normalise != "factored":
        yield f"normalise={config.normalise!r}"


def _why_not_there(batch: Batch) -> str:
    for member in batch.members:
        for tensor in (member.weight, *member.local.values()):
            if tensor.dtype not in DTYPES:
                return str(tensor.dtype)
            if not tensor.is_contiguous():
                return "tensors that are not contiguous"
    return ""
