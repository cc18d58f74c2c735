# SPDX-License-Identifier: Apache-2.0
"""Mutations of tiles made orthogonal and of rules that keep two moments."""

from __future__ import annotations

from tests.kernels.mutation import FIXED, Mutation

OF_UPDATES = {
    "relative lr, start": Mutation(
        file="settle.cpp",
        old="if (!(*start > 0)) *start = own;",
        new="*start = own;",
        test=FIXED,
        select="relative",
    ),
    "relative lr, bound": Mutation(
        file="settle.cpp",
        old="constexpr float kMostGrown = 2;",
        new="constexpr float kMostGrown = 1;",
        test=FIXED,
        select="relative",
    ),
    "tiles, a step's polynomial": Mutation(
        file="tiles.h",
        old="p.b * own + p.c * sum",
        new="p.b * own + 0.99f * p.c * sum",
        test=FIXED,
        select="tiles",
    ),
    "tiles, size": Mutation(
        file="tiles.h",
        old="size / at_least_tiny(after)",
        new="1 / at_least_tiny(after)",
        test=FIXED,
        select="tiles",
    ),
    "tiles, which rows": Mutation(
        file="finish.h",
        old="first = (last - 1) / side * side;",
        new="first = larger(0, last - side);",
        test=FIXED,
        select="tiles",
    ),
    "two moments, second": Mutation(
        file="adam.h",
        old="now.beta2 * load(m.second + n)",
        new="0.99f * load(m.second + n)",
        test=FIXED,
        select="apollo",
    ),
    "two moments, window": Mutation(
        file="adam.h", old="v[r] = sum / m.rank;", new="v[r] = sum;", test=FIXED, select="subspace"
    ),
    "two moments, weights": Mutation(
        file="adam.h",
        old="gain * load(m.whitened + n) - share",
        new="gain * load(m.whitened + n) - 0.99f * share",
        test=FIXED,
        select="subspace",
    ),
    "two moments, scale": Mutation(
        file="adam.h",
        old="ratio * __builtin_sqrtf(steps)",
        new="ratio * steps",
        test=FIXED,
        select="apollo",
    ),
}
