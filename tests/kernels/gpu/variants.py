# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as they may be launched: what ``lint.py`` compiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import triton.language as tl

from flora_dist.kernels.gpu.access import APOLLO, BY_GROWTH, BY_SIZE, RAW
from flora_dist.kernels.gpu.cut import couple_cut, measure_cut, settle_cut
from flora_dist.kernels.gpu.finish import finish
from flora_dist.kernels.gpu.measure import measure, measure_rows
from flora_dist.kernels.gpu.records import add_records
from flora_dist.kernels.gpu.settle import MATRIX_NUMBERS, gather, gather_rows, scale, settle
from flora_dist.kernels.gpu.shapes import (
    AS_TORCH,
    MEASURE_OPTIONS,
    MEASURED_ROWS,
    RECORD_OPTIONS,
    RECORD_ROWS,
    ROW_OPTIONS,
    SETTLED_ROWS,
    TILE_ROWS,
    measure_options,
    pass_of,
    row_step_of,
)
from flora_dist.kernels.gpu.sketch import accumulate
from flora_dist.kernels.gpu.vector import finish_vector, measure_vector

CAPABILITIES = (80, 90, 100)
RULES = (0, 1, 2, 3, 4, 5, 6)
FEW_BIT_RULES = RULES[:5]
"""The others keep two moments, never in few bits."""
_NAMES = {tl.bfloat16: "bf16", tl.float32: "fp32", tl.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel as it may be launched."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int | bool]
    elements: int
    """Of a program's tile."""


DENSE = {"BITS": 0, "DRAWN": 0, "DRAWN_PADDED": 16, "KEPT": 0}
RECORDS = {"BITS": 4, "DRAWN": 64, "DRAWN_PADDED": 64, "KEPT": 0}
SKETCHES = {**DENSE, "BITS": 32, "DRAWN": 16}
FEW_BITS = {**DENSE, "KEPT": 4}


def raw_of(rule: int) -> int:
    """NORMALISE: ``apollo`` takes gradients as they are."""
    return RAW.value if rule == APOLLO.value else 0


def variants(
    *,
    rules: tuple[int, ...],
    dtypes: tuple[Any, ...],
    drawn: Mapping[str, int] = MappingProxyType(DENSE),
) -> Iterator[Variant]:
    """Kernels over matrices at rank 8 of 64, aligned; ``drawn``: how gradients are kept."""
    for dtype, rule in itertools.product(dtypes, rules):
        name = f"{_NAMES[dtype]} rule {rule}" + f" of {drawn['BITS']} bits" * (drawn["BITS"] > 0)
        kind = "_sketches" if drawn["BITS"] else "_few_bits" if drawn["KEPT"] else ""
        shared = {
            "ROWS": TILE_ROWS, "WIDTH": 64, "RANK": 8, "PADDED": 16, "GRADIENT": dtype,
            "WEIGHT": dtype, "MOMENTUM": tl.float32, "ALIGNED": True, "NORMALISE": raw_of(rule),
            **drawn,
        }  # fmt: skip
        sums = {"SUMS": 3 if rule == 2 else 2, "HISTORY": rule == 2, "SCALED": False}
        yield Variant(
            name=f"measure{'_sketches' if drawn['BITS'] else ''} {name}",
            kernel=measure,
            constants={**shared, **sums},
            options=measure_options(drawn["BITS"]),
            elements=TILE_ROWS * 64,
        )
        if rule == 0 and drawn == DENSE:
            yield from _of_rows(dtype)
        rows, options = pass_of(
            bits=drawn["BITS"], kept_bits=drawn["KEPT"], moments=1 + (rule not in FEW_BIT_RULES)
        )
        passed = {
            "ROWS": rows, "RULE": rule, "GROUP": 4, "WINDOW": 0, "TALLIES": 0, "ROUNDS": True,
            "CUT": False,
        }  # fmt: skip
        yield Variant(
            name=f"finish{kind}{'_scaled' * (kind != '' and rule == APOLLO.value)} {name}",
            kernel=finish,
            constants={**shared, **passed},
            options=options,
            elements=rows * 64,
        )


def _of_rows(dtype: Any) -> Iterator[Variant]:
    """Whole rows, short and as long as can be."""
    for width in (256, 2048, 4096, 8192):
        step = row_step_of(width)
        yield Variant(
            name=f"measure_rows {_NAMES[dtype]} {width}",
            kernel=measure_rows,
            constants={
                "SUMS": 2, "ROWS": MEASURED_ROWS, "STEP": step, "WIDTH": width,
                "GRADIENT": dtype, "ALIGNED": True, "NORMALISE": 0,
            },
            options=ROW_OPTIONS,
            elements=step * width,
        )  # fmt: skip


def others() -> Iterator[Variant]:
    """Kernels over sums and over vectors, and the sketches of gradients."""
    options = {"num_warps": 4}
    sums = {"SUMS": 2, "HISTORY": False, "SCALED": False, "TILES": 16, "WIDTH": 128}
    scaling = {
        "RULE": 1,
        "CLIPS_INPUT": True,
        "KNOWN": False,
        "NUMBERS": MATRIX_NUMBERS.value,
        "WIDTH": 128,
    }
    for name, kernel, constants in (
        ("gather", gather, sums),
        ("gather_rows", gather_rows, {"WIDTH": 128}),
        ("scale", scale, {**scaling, "BOUND": 1, "SCALED": BY_SIZE.value}),
        ("scale growth", scale, {**scaling, "BOUND": 2, "SCALED": BY_SIZE.value}),
        ("scale relative", scale, {**scaling, "BOUND": 1, "SCALED": BY_GROWTH.value}),
    ):
        yield Variant(name=name, kernel=kernel, constants=constants, options=options, elements=0)
    for name, kernel, constants in (
        ("settle", settle, {"SUMS": 2, "NORMALISE": 0, "WIDTH": 1024}),
        ("settle_cut", settle_cut, {"ROWS": SETTLED_ROWS}),
    ):
        yield Variant(name=name, kernel=kernel, constants=constants, options=AS_TORCH, elements=0)
    vector = {
        "RULE": 1, "CHUNK": 1024, "GRADIENT": tl.bfloat16, "WEIGHT": tl.bfloat16,
        "MOMENTUM": tl.float32,
    }  # fmt: skip
    for name, kernel, more in (
        ("measure_vector", measure_vector, {"CLIPS_INPUT": True}),
        ("finish_vector", finish_vector, {"ROUNDS": True}),
    ):
        constants = {**vector, **more}
        yield Variant(name=name, kernel=kernel, constants=constants, options=options, elements=0)
    yield Variant(
        name="accumulate bf16",
        kernel=accumulate,
        constants={
            "ROWS": TILE_ROWS, "BLOCK": 64, "RANK": 8, "PADDED": 16, "GROUP": 4,
            "ADDS": True,
        },
        options=MEASURE_OPTIONS,
        elements=TILE_ROWS * 64,
    )  # fmt: skip


def of_one_block() -> Iterator[Variant]:
    """A launch over one parameter of one block: Triton makes constants of arguments that are 1."""
    drawn = list(variants(rules=(1,), dtypes=(tl.bfloat16,), drawn=RECORDS))
    for each in drawn:
        if each.kernel is finish:
            ones = {"members": 1, "num_blocks": 1}
            yield replace(
                each, name="finish_sketches one block", constants={**each.constants, **ones}
            )


def of_cut_rows(*, rules: tuple[int, ...], dtypes: tuple[Any, ...]) -> Iterator[Variant]:
    """Kernels over cut rows, as of column shards whose columns are multiples of 16."""
    for dtype, rule in itertools.product(dtypes, rules):
        name, asks = f"{_NAMES[dtype]} rule {rule}", rule == 2
        shared = {
            "ROWS": TILE_ROWS, "WIDTH": 64, "RANK": 8, "PADDED": 16, "GRADIENT": dtype,
            "MOMENTUM": tl.float32, "ALIGNED": True, **DENSE,
        }  # fmt: skip
        sums = {"SUMS": 1, "TRAVELS": False, "HISTORY": asks, "SCALED": False, "WEIGHT": dtype}
        coupled = {"SUMS": 3 if asks else 2, "SKETCHES": True, "GROUP": 4}
        passed = {
            "RULE": rule, "GROUP": 4, "WINDOW": 0, "TALLIES": 0, "ROUNDS": True, "CUT": True,
            "WEIGHT": dtype, "NORMALISE": raw_of(rule),
        }  # fmt: skip
        coupled["NORMALISE"] = raw_of(rule)
        _, options = pass_of(bits=0, kept_bits=0, moments=1)
        for kind, kernel, constants, own in (
            ("measure_cut", measure_cut, sums, measure_options(0)),
            ("couple_cut", couple_cut, coupled, options),
            ("finish_cut", finish, passed, options),
        ):
            yield Variant(
                name=f"{kind} {name}",
                kernel=kernel,
                constants={**shared, **constants},
                options=own,
                elements=TILE_ROWS * 64,
            )


def of_records() -> Iterator[Variant]:
    """Gradients that are added to records of all numbers of a block, in 4 bits."""
    for how, name in enumerate(("adds", "begins")):
        yield Variant(
            name=f"add_records {name}",
            kernel=add_records,
            constants={
                "ROWS": RECORD_ROWS, "BLOCK": 64, "RANK": 64, "PADDED": 64, "GROUP": 4, "BITS": 4,
                "BEGINS": how,
            },
            options=RECORD_OPTIONS,
            elements=RECORD_ROWS * 64,
        )  # fmt: skip


def quick() -> Iterator[tuple[int, Variant]]:
    """The default settings in bfloat16 for each GPU, and what is small for one."""
    chosen = [v for v in variants(rules=(1,), dtypes=(tl.bfloat16,)) if v.kernel is finish]
    chosen += [each for each in _of_rows(tl.bfloat16) if each.constants["WIDTH"] == 4096]
    yield from itertools.product(CAPABILITIES, chosen)
    small = [
        *others(),
        *of_one_block(),
        *of_records(),
        *of_cut_rows(rules=(1,), dtypes=(tl.bfloat16,)),
    ]
    yield from ((90, each) for each in small)


def everything() -> Iterator[tuple[int, Variant]]:
    """Every variant for each GPU."""
    chosen = list(variants(rules=RULES, dtypes=(tl.bfloat16, tl.float32, tl.float16)))
    for drawn, rules in ((RECORDS, RULES), (SKETCHES, RULES), (FEW_BITS, FEW_BIT_RULES)):
        chosen += variants(rules=rules, dtypes=(tl.bfloat16,), drawn=drawn)
    chosen += of_cut_rows(rules=RULES, dtypes=(tl.bfloat16, tl.float32))
    chosen += [*others(), *of_one_block(), *of_records()]
    yield from itertools.product(CAPABILITIES, chosen)
