# SPDX-License-Identifier: Apache-2.0
"""Faults that ``mutations.py`` puts into the Triton kernels, and the checks that must notice."""

from __future__ import annotations

from dataclasses import dataclass

CHECKS = {
    "blend": "runs.difference(runs.FIXED)",
    "flora": "runs.difference(runs.with_rule('flora', clip=0.01))",
    "strict": "runs.difference(runs.with_rule('flora_strict', clip=0.01))",
    "long rows": "runs.difference(runs.with_rule('none', scale_parameter=True))",
    "subspace": "runs.difference(runs.with_rule('subspace_adam', rank=4, blend_gain=2.0))",
    "apollo": "runs.difference(runs.with_rule('apollo', rank=4, clip=0.3))",
    "apollo columns": "cut_runs.difference(cut_runs.with_rule(cut_runs.SHARDED, 'apollo', rank=2))",
    "bits": "bits.wrong_bits('cpu')",
    "sketches": "sketch_runs.wrong_sketches('cpu')",
    "records": "record_runs.wrong_records('cpu', range(4))",
    "steps on sketches": "drawn_runs.wrong_steps('cpu', range(2))",
    "ademamix": "runs.difference(runs.with_rule('ademamix', blend_gain=3.0))",
    "growth": "runs.difference(runs.with_rule('blend', growth=1.01, clip=None))",
    "by columns": "runs.difference(runs.with_rule('blend', normalise='columns'))",
    # A clip would undo a factor of all of X.
    "by columns, no clip": "runs.difference(runs.unclipped(normalise='columns'))",
    "by rows": "runs.difference(runs.unclipped(normalise='rows'))",
    "relative": "runs.difference(runs.with_rule('blend', scale_parameter='relative', lr=0.1))",
    "spans": "cut_runs.difference(cut_runs.SPANNED)",
    "spans blend": "cut_runs.difference(cut_runs.with_rule(cut_runs.SPANNED, 'blend'))",
    "columns": "cut_runs.difference(cut_runs.SHARDED)",
}
"""Expressions of this folder's modules that are empty where nothing is wrong."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of a source, and the check that must notice."""

    file: str
    old: str
    new: str
    check: str


MUTATIONS = {
    "scale, start": Mutation(
        file="settle.py",
        old="start = tl.where(start > 0.0, start, size)",
        new="start = size",
        check="relative",
    ),
    "scale, bound of a relative lr": Mutation(
        file="settle.py",
        old="tl.maximum(size / start, 1.0 / _MOST_GROWN), _MOST_GROWN)",
        new="tl.maximum(size / start, 1.0), 1.0)",
        check="relative",
    ),
    "measure, whole rows": Mutation(
        file="measure.py",
        old="plain += tl.sum(square, 0)",
        new="plain += 0.99 * tl.sum(square, 0)",
        check="blend",
    ),
    "measure, rows": Mutation(
        file="measure.py",
        old="+ tl.load(numbers + FRESH) * mean",
        new="+ 0.99 * tl.load(numbers + FRESH) * mean",
        check="blend",
    ),
    "measure, rows piece by piece": Mutation(
        file="measure.py",
        old="tl.store(out, tl.sum(square, 0), mask=is_column)",
        new="tl.store(out, 0.99 * tl.sum(square, 0), mask=is_column)",
        check="long rows",
    ),
    "measure, weights": Mutation(
        file="measure.py",
        old="size += tl.sum(w * w, 1)",
        new="size += tl.sum(w, 1)",
        check="long rows",
    ),
    "measure, old momentum": Mutation(
        file="measure.py",
        old="history += tl.sum(past * past, 1)",
        new="history += 2 * tl.sum(past * past, 1)",
        check="flora",
    ),
    "gather": Mutation(
        file="settle.py",
        old="tl.store(columns_out + out, total, mask=is_column)",
        new="tl.store(columns_out + out, 0.99 * total, mask=is_column)",
        check="blend",
    ),
    "gather_rows": Mutation(
        file="settle.py",
        old="MATRIX_SUMMED), tl.sum(total, 0))",
        new="MATRIX_SUMMED), 0.9 * tl.sum(total, 0))",
        check="strict",
    ),
    "settle": Mutation(
        file="settle.py",
        old="tl.store(column_out + made + columns, c, mask=inside)",
        new="tl.store(column_out + made + columns, 0.99 * c, mask=inside)",
        check="blend",
    ),
    "scale": Mutation(
        file="settle.py",
        old="rate = tl.load(numbers + LR) +",
        new="rate = 0.99 * tl.load(numbers + LR) +",
        check="blend",
    ),
    "finish, update": Mutation(
        file="rules.py",
        old="* entry * (made - c), new_a)",
        new="* entry * made, new_a)",
        check="blend",
    ),
    "finish, window": Mutation(
        file="rules.py",
        old="m = tl.dot(m, step",
        new="m = tl.dot(-m, step",
        check="blend",
    ),
    "finish, weights": Mutation(
        file="finish.py", old="* keep - rate * u", new="* keep - 0.99 * rate * u", check="blend"
    ),
    "finish, norms": Mutation(
        file="finish.py",
        old="size += tl.sum(tl.where(inside, u * u, 0.0), 1)",
        new="size += 0.9 * tl.sum(tl.where(inside, u * u, 0.0), 1)",
        check="strict",
    ),
    "ademamix": Mutation(
        file="rules.py",
        old="* entry * made, new_a)",
        new="* entry * (made - c), new_a)",
        check="ademamix",
    ),
    "ademamix of vectors": Mutation(
        file="vector.py",
        old="u += tl.load(numbers + GAIN) * made",
        new="u += made",
        check="ademamix",
    ),
    "two moments, window": Mutation(
        file="rules.py", old="tl.sum(v, 1) / RANK", new="tl.sum(v, 1)", check="subspace"
    ),
    "two moments, second": Mutation(
        file="rules.py",
        old="tl.load(numbers + BETA2) * v + fresh",
        new="0.99 * tl.load(numbers + BETA2) * v + fresh",
        check="subspace",
    ),
    "two moments, where the second is kept": Mutation(
        file="finish.py",
        old="v = loaded(momentum + RANK, inside_m)",
        new="v = loaded(momentum, inside_m)",
        check="subspace",
    ),
    "subspace_adam": Mutation(
        file="rules.py",
        old="- (RANK / BLOCK) * c",
        new="- 0.99 * (RANK / BLOCK) * c",
        check="subspace",
    ),
    "apollo": Mutation(
        file="rules.py",
        old="usual = tl.sqrt(tl.sum(tl.where(inside, v, 0.0), 1))",
        new="usual = 9 * tl.sqrt(tl.sum(tl.where(inside, v, 0.0), 1))",
        check="apollo",
    ),
    "raw, rows": Mutation(
        file="access.py",
        old="if NORMALISE < BY_COLUMNS else",
        new="if NORMALISE != BY_COLUMNS else",
        check="apollo",
    ),
    "raw, columns": Mutation(
        file="settle.py",
        old="if NORMALISE % 2 == BY_ROWS:",
        new="if NORMALISE == BY_ROWS:",
        check="apollo",
    ),
    "growth, factor": Mutation(
        file="settle.py",
        old="tl.where(last > _LEAST_NORM, growth * last, norm)",
        new="tl.where(last > _LEAST_NORM, 1.01 * growth * last, norm)",
        check="growth",
    ),
    "growth, norm": Mutation(
        file="settle.py",
        old="tl.where(bound < norm, bound, norm)",
        new="tl.where(bound < norm, norm, bound)",
        check="growth",
    ),
    "by columns, squares": Mutation(
        file="measure.py",
        old="weight = tl.where(is_row, 1.0, 0.0)",
        new="weight = tl.where(is_row, 1.0 / row, 0.0)",
        check="by columns",
    ),
    "by columns, factor": Mutation(
        file="settle.py",
        old="        root = 1.0",
        new="        root *= 1.0",
        check="by columns, no clip",
    ),
    "by rows": Mutation(
        file="settle.py",
        old="            factor = tl.full((WIDTH,), 1.0",
        new="            factor = tl.full((WIDTH,), 1.01",
        check="by rows",
    ),
    "cut rows, columns": Mutation(
        file="cut.py",
        old="tl.store(out, tl.sum(square, 0), mask=is_column)",
        new="tl.store(out, 0.99 * tl.sum(square, 0), mask=is_column)",
        check="columns",
    ),
    "cut rows, sums": Mutation(
        file="cut.py",
        old="tl.store(rows_out + slots, sums, mask=is_row)",
        new="tl.store(rows_out + slots, 0.99 * sums, mask=is_row)",
        check="columns",
    ),
    "cut rows, elements": Mutation(
        file="cut.py",
        old="tl.store(elements + places, g, mask=inside)",
        new="tl.store(elements + places, 0.99 * g, mask=inside)",
        check="spans",
    ),
    "cut rows, products": Mutation(
        file="cut.py",
        old="tl.store(products + places, g * past, mask=inside)",
        new="tl.store(products + places, -g * past, mask=inside)",
        check="spans",
    ),
    "cut rows, old momentum": Mutation(
        file="cut.py",
        old="history += tl.sum(past * past, 1)",
        new="history += 4 * tl.sum(past * past, 1)",
        check="columns",
    ),
    "cut rows, weights": Mutation(
        file="cut.py", old="size += tl.sum(w * w, 1)", new="size += tl.sum(w, 1)", check="columns"
    ),
    "cut rows, new R": Mutation(
        file="cut.py",
        old="tl.load(numbers + BETA2) * before",
        new="0.99 * tl.load(numbers + BETA2) * before",
        check="columns",
    ),
    "cut rows, squares": Mutation(
        file="cut.py", old="tl.sum(x * x, 1)", new="0.9 * tl.sum(x * x, 1)", check="columns"
    ),
    "cut rows, cross": Mutation(
        file="cut.py", old="tl.sum(x * past, 1)", new="-tl.sum(x * past, 1)", check="columns"
    ),
    "cut blocks, sketches": Mutation(
        file="cut.py",
        old="c = tl.load(numbers + ENTRY) * product(x, tl.trans(a))",
        new="c = 0.99 * tl.load(numbers + ENTRY) * product(x, tl.trans(a))",
        check="columns",
    ),
    "cut blocks, whole": Mutation(
        file="finish.py",
        old="found * x_factor, c)",
        new="found, c)",
        check="spans blend",
    ),
    "cut blocks, place": Mutation(
        file="access.py",
        old="is_tail = (block > 0) & (block == blocks - 1)",
        new="is_tail = (block > 0) & (block == blocks)",
        check="columns",
    ),
    "vectors, measure": Mutation(
        file="vector.py",
        old="tl.store(out, tl.sum(u * u, 0))",
        new="tl.store(out, 0.9 * tl.sum(u * u, 0))",
        check="blend",
    ),
    "vectors, finish": Mutation(
        file="vector.py",
        old="tl.store(state + places, second, mask=inside)",
        new="tl.store(state + places, 0.99 * second, mask=inside)",
        check="blend",
    ),
    "random bits": Mutation(file="rounding.py", old="both >> 16)", new="both >> 15)", check="bits"),
    "rounding": Mutation(
        file="rounding.py", old="+ bits) >> 16", new="+ bits // 2) >> 16", check="bits"
    ),
    "sketched sums": Mutation(
        file="sketch.py", old="c += loaded(at", new="c -= loaded(at", check="sketches"
    ),
    "records, reading": Mutation(
        file="codes.py",
        old="tl.where(is_level, 256, 0)",
        new="tl.where(is_level, 0, 0)",
        check="records",
    ),
    "records, packing order": Mutation(
        file="codes.py",
        old="codes, 0) << ((ranks % per) * BITS)",
        new="codes, 0) << ((per - 1 - ranks % per) * BITS)",
        check="records",
    ),
    "records, rounding": Mutation(
        file="codes.py", old="+ 0.5) * _UNIT)", new="+ 0.5) * _UNIT * 0.5)", check="records"
    ),
    "records, scale": Mutation(
        file="codes.py",
        old="bitcast=True) + 0xFFFF) >> 16",
        new="bitcast=True) + 0x7FFF) >> 16",
        check="records",
    ),
    "records, levels": Mutation(
        file="codes.py",
        old="codes += (z >= tl.load",
        new="codes += (z > 0.5 + tl.load",
        check="records",
    ),
    "records, what was kept": Mutation(
        file="records.py",
        old="c += decoded(at",
        new="c += 0 * decoded(at",
        check="records",
    ),
    "records, whose line": Mutation(
        file="records.py",
        old="first_line.to(tl.int64) + down",
        new="down",
        check="records",
    ),
    "finish, momentum in few bits": Mutation(
        file="finish.py",
        old="rounded_codes(made, bits, KEPT)",
        new="rounded_codes(0.8 * made, bits, KEPT)",
        check="steps on sketches",
    ),
    "steps on sketches, factor": Mutation(
        file="expand.py",
        old="scale = factor * tl.load",
        new="scale = tl.load",
        check="steps on sketches",
    ),
    "steps on sketches, place": Mutation(
        file="expand.py",
        old="// width + rows",
        new="// width + 0 * rows",
        check="steps on sketches",
    ),
}
