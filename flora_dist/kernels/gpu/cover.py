# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels step. Imports no Triton: machines without it ask too."""

from __future__ import annotations

import torch

from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.batch import Batch, arithmetic_dtype
from flora_dist.core.step.gradient import Gradient, SketchedGradient
from flora_dist.core.step.momentum_rules import rule_of
from flora_dist.kernels.tables import DTYPES, NORMALISATIONS, RULES

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Below, products have no instruction; above, a block does not fit in a program's registers."""
LARGEST_RANK = 64
MOST_MATRICES = 65535
"""Of a batch that one launch steps: CUDA's limit."""


def why_not(batch: Batch, gradient: Gradient) -> str:
    """Why a batch takes torch's operators; empty where the kernels step it."""
    if isinstance(gradient, SketchedGradient) and (what := _why_not_sketched(batch, gradient)):
        return what
    reason = why_not_of(batch.geometry, batch.config, batch.members[0].weight.dtype)
    if len(batch.members) * max(1, batch.matrices_here) > MOST_MATRICES:
        reason = f"more than {MOST_MATRICES:,} matrices of one shape"
    return reason or _why_not_there(batch)


def _why_not_sketched(batch: Batch, gradient: SketchedGradient) -> str:
    rank, block = gradient.sketch_ERB.shape[1:]
    dtypes = {gradient.sketch_ERB.dtype, *(tile.dtype for tile in gradient.tiles)}
    if dtypes != {torch.float32}:
        return f"sketched gradients in {gradient.sketch_ERB.dtype}"
    if batch.sketches is not None and block != batch.geometry.block:
        return f"sketched gradients in blocks of {block}"
    if not are_sizes_covered(rank, block):
        return f"sketched gradients of rank {rank} per block of {block}"
    return ""


def are_sizes_covered(rank: int, block: int) -> bool:
    """Whether products have instructions for such sketches, and room in registers."""
    is_block = block.bit_count() == 1 and SMALLEST_BLOCK <= block <= LARGEST_BLOCK
    return is_block and rank <= LARGEST_RANK


def why_not_of(size: Geometry, config: FloraConfig, dtype: torch.dtype) -> str:
    """The same of a parameter's shape and settings."""
    rule = rule_of(config, size)
    if rule is not None and type(rule) not in RULES:
        return f"momentum={config.momentum!r}"
    if not size.is_vector and config.orthogonalise is not None:
        return f"orthogonalise={config.orthogonalise}"
    if not size.is_vector and config.normalise not in NORMALISATIONS:
        return f"normalise={config.normalise!r}"
    if arithmetic_dtype(dtype) != torch.float32 or dtype not in DTYPES:
        return str(dtype)
    if rule is None or size.rank is None or are_sizes_covered(size.rank, size.block):
        return ""
    return f"rank {size.rank} per block of {size.block}"


def _why_not_there(batch: Batch) -> str:
    for member in batch.members:
        for tensor in (member.weight, *member.local.values()):
            if tensor.dtype not in {*DTYPES, torch.uint8}:  # octets are a momentum's records
                return str(tensor.dtype)
            if not tensor.is_contiguous():
                return "tensors that are not contiguous"
    return ""
