# SPDX-License-Identifier: Apache-2.0
"""Parameters of at most one dimension: V per element. core/step/vector.py has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from flora_dist.kernels.gpu.access import (
    ADEMAMIX,
    BETA1,
    BETA2,
    EPS,
    FRESH,
    GAIN,
    KEEP,
    NEW,
    NONE,
    SIGN,
    loaded,
    pointer,
)
from flora_dist.kernels.gpu.rounding import bits_of_rows, rounded

VECTOR_WEIGHT = tl.constexpr(0)
VECTOR_MOMENTUM = tl.constexpr(1)
VECTOR_SECOND = tl.constexpr(2)
VECTOR_FIRST = tl.constexpr(3)
VECTOR_NUMBERS = tl.constexpr(4)
SINGLES = tl.constexpr(4)
"""Sums of a chunk: |X|^2 or |U|^2, whichever is clipped, |W|^2, V, and |G|."""


@triton.jit
def measure_vector(
    vectors,
    given,
    numbers,
    singles,
    first_column,
    width,
    RULE: tl.constexpr,
    CLIPS_INPUT: tl.constexpr,
    CHUNK: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Sums of one chunk of one parameter: ``singles`` (members, chunks, SINGLES)."""
    vector = vectors + tl.program_id(1) * VECTOR_NUMBERS
    places = _places(first_column, CHUNK)
    inside = (places >= 0) & (places < width)
    g, second = _second(vector, given, numbers, places, inside, GRADIENT)
    u = tl.where(inside, g * tl.rsqrt(second), 0.0)
    if RULE != NONE and not CLIPS_INPUT:
        momentum = pointer(tl.load(vector + VECTOR_MOMENTUM), MOMENTUM, False)
        m = loaded(momentum + places, inside)
        u = tl.load(numbers + NEW) * u + tl.load(numbers + BETA1) * m
    w = loaded(pointer(tl.load(vector + VECTOR_WEIGHT), WEIGHT, False) + places, inside)
    chunk = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    out = singles + chunk * SINGLES
    tl.store(out, tl.sum(u * u, 0))
    tl.store(out + 1, tl.sum(w * w, 0))
    tl.store(out + 2, tl.sum(tl.where(inside, second, 0.0), 0))
    tl.store(out + 3, tl.sum(tl.abs(g), 0))


@triton.jit
def finish_vector(
    vectors,
    given,
    keys,
    numbers,
    scales,
    members,
    first_column,
    width,
    RULE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUNDS: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Step one chunk of one parameter; ``scales`` (members, 2) of X and of the step."""
    member = tl.program_id(1)
    vector = vectors + member * VECTOR_NUMBERS
    places = _places(first_column, CHUNK)
    inside = (places >= 0) & (places < width)
    g, second = _second(vector, given, numbers, places, inside, GRADIENT)
    # X = G / sqrt(V), times the clip where X is what is clipped
    u = g * tl.rsqrt(second) * tl.load(scales + 2 * member)
    if RULE != NONE:
        # A = I: M <- b M + (1-b) X, and U = M, or X + gain M
        momentum = pointer(tl.load(vector + VECTOR_MOMENTUM), MOMENTUM, False) + places
        made = tl.load(numbers + NEW) * u + tl.load(numbers + BETA1) * loaded(momentum, inside)
        key = keys + members + member
        _store(momentum, made, inside, key, first_column, MOMENTUM, ROUNDS, CHUNK)
        if RULE == ADEMAMIX:
            u += tl.load(numbers + GAIN) * made
        else:
            u = made
    weight = pointer(tl.load(vector + VECTOR_WEIGHT), WEIGHT, False) + places
    w = loaded(weight, inside) * tl.load(numbers + KEEP) - tl.load(scales + 2 * member + 1) * u
    _store(weight, w, inside, keys + member, first_column, WEIGHT, ROUNDS, CHUNK)
    state = pointer(tl.load(vector + VECTOR_SECOND), tl.float32, False)
    tl.store(state + places, second, mask=inside)


@triton.jit
def _places(first_column, CHUNK: tl.constexpr):
    """Places of a chunk among the elements here; chunks begin at multiples of 8 of the whole."""
    return tl.program_id(0) * CHUNK + tl.arange(0, CHUNK) - first_column % 8


@triton.jit
def _second(vector, given, numbers, places, inside, GRADIENT: tl.constexpr):
    """G times the sign, and V <- b2 V + (1-b2) (G^2 + eps)."""
    address = tl.load(given + tl.program_id(1))
    g = loaded(pointer(address, GRADIENT, False) + places, inside) * tl.load(numbers + SIGN)
    state = pointer(tl.load(vector + VECTOR_SECOND), tl.float32, False)
    before = tl.load(numbers + BETA2) * tl.load(state + places, mask=inside, other=1.0)
    return g, before + tl.load(numbers + FRESH) * (g * g + tl.load(numbers + EPS))


@triton.jit
def _store(
    at,
    value,
    inside,
    key,
    first_column,
    DTYPE: tl.constexpr,
    ROUNDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write a chunk, in the dtype that it is kept in."""
    if ROUNDS and DTYPE != tl.float32:
        start = first_column // 8 * 8 + tl.program_id(0) * CHUNK
        line = tl.zeros((1,), tl.int64)
        bits = tl.reshape(bits_of_rows(tl.load(key), line, start, 0, CHUNK), (CHUNK,))
        patterns = at.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(patterns, rounded(value, bits, DTYPE), mask=inside)
    else:
        tl.store(at, value.to(DTYPE), mask=inside)
