# SPDX-License-Identifier: Apache-2.0
"""The momentum rules inside a kernel, of one block of some rows.

core/step/momentum_rules.py has the formulas. ``numbers``: a step's scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.core.step.momentum_rules import LEAST_OF_USUAL
from flora_dist.kernels.gpu.access import (
    ADEMAMIX,
    BETA1,
    BETA2,
    BLEND,
    ENTRY,
    FLORA,
    FRESH,
    GAIN,
    MOVES,
    NEW,
    RESETS,
    SKETCH_EPS,
    STAYS,
    product,
)

_LEAST_OF_USUAL = tl.constexpr(LEAST_OF_USUAL)


@triton.jit
def advanced(numbers, m, x):
    """M <- b M + (1-b) x."""
    return tl.load(numbers + BETA1) * m + tl.load(numbers + NEW) * x


@triton.jit
def moved(m, step, WINDOW: tl.constexpr):
    """M in the new window; ``step``: s A_old A_new^T where it changes."""
    if WINDOW == MOVES:
        m = tl.dot(m, step, input_precision="tf32x3")
    elif WINDOW == RESETS:
        m = m * 0.0
    return m


@triton.jit
def sketched(numbers, x, c, m, new_a, old_a, step, RULE: tl.constexpr, WINDOW: tl.constexpr):
    """U of a block from X, its sketch and the stored M, and the new M."""
    entry = tl.load(numbers + ENTRY)
    # M <- b move(M) + (1-b) c
    made = advanced(numbers, moved(m, step, WINDOW), c)
    if RULE == BLEND:
        # U = X + gain (rank/block) (M - c) A_new
        u = x + product(tl.load(numbers + GAIN) * entry * (made - c), new_a)
    elif RULE == ADEMAMIX:
        # U = X + gain (rank/block) M A_new
        u = x + product(tl.load(numbers + GAIN) * entry * made, new_a)
    elif RULE == FLORA:
        # U = (1-b) X + b M A_old
        u = advanced(numbers, entry * product(m, old_a), x)
    else:
        # U = M A_new
        u = entry * product(made, new_a)
    return u, made


@triton.jit
def advanced_moments(numbers, c, m, v, step, RANK: tl.constexpr, WINDOW: tl.constexpr):
    """The new M and V of a sketch, from the stored ones."""
    # M <- b move(M) + (1-b) c
    made = advanced(numbers, moved(m, step, WINDOW), c)
    if WINDOW != STAYS:
        # A turned block has another number in every place; its mean square is what stays.
        v = tl.zeros_like(v) + (tl.sum(v, 1) / RANK)[:, None]
    # V <- b2 V + (1-b2) (c^2 + eps)
    fresh = tl.load(numbers + FRESH) * (c * c + tl.load(numbers + SKETCH_EPS))
    return made, tl.load(numbers + BETA2) * v + fresh


@triton.jit
def in_subspace(numbers, x, c, m, v, new_a, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """U of ``subspace_adam`` from X, its sketch, and the new M and V."""
    # U = X + (gain sqrt(rank/block) M / sqrt(V) - (rank/block) c) A_new; GAIN holds rank/block
    gain = tl.load(numbers + GAIN) * (BLOCK / RANK) ** 0.5
    weighed = gain * (m * tl.rsqrt(v)) - (RANK / BLOCK) * c
    return x + product(tl.load(numbers + ENTRY) * weighed, new_a)


@triton.jit
def scaled_blocks(x, c, m, v, inside, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """U of ``apollo`` from X, its sketch, and the new M and V, of which ``inside`` are kept."""
    # U = sqrt(block/rank) |M / sqrt(V)| / max(|c|, |sqrt(V)| / 10) X
    whitened = m * tl.rsqrt(v)
    usual = tl.sqrt(tl.sum(tl.where(inside, v, 0.0), 1))
    size = tl.maximum(tl.sqrt(tl.sum(c * c, 1)), usual * _LEAST_OF_USUAL)
    scale = (BLOCK / RANK) ** 0.5 * tl.sqrt(tl.sum(whitened * whitened, 1)) / size
    return x * scale[:, None]
