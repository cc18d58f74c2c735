# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, wide loads.

    python -m tests.kernels.gpu.lint            # every variant for sm_80, sm_90 and sm_100
    python -m tests.kernels.gpu.lint --quick    # the default settings alone, as the tests do

Triton's wheel brings ptxas and cuobjdump. Kernels that were compiled before come from its cache.
The exit code is 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flora_dist.kernels.gpu.finish import finish
from flora_dist.kernels.gpu.measure import measure, measure_rows
from flora_dist.kernels.gpu.records import add_records
from flora_dist.kernels.gpu.settle import gather, scale, settle
from flora_dist.kernels.gpu.shapes import (
    EXPANDED_OPTIONS,
    MEASURE_OPTIONS,
    MEASURED_ROWS,
    RECORD_OPTIONS,
    RECORD_ROWS,
    ROW_OPTIONS,
    TILE_ROWS,
    finish_of,
    row_step_of,
)
from flora_dist.kernels.gpu.sketch import accumulate
from flora_dist.kernels.gpu.vector import finish_vector, measure_vector

CAPABILITIES = (80, 90, 100)
# Two programs of 256 threads, or four of 128, share an SM's 65,536 registers; three of 128 where a
# kernel asks for 168.
LARGEST_REGISTERS = 128
# Of the loop over a tile. At 28e12 instructions of a lane per second (132 SMs of an H100 at
# 1.7 GHz) 100 take 3.5 ps, as long as 12 bytes take at its 3.35 TB/s.
LARGEST_PER_ELEMENT = {
    "measure": 60,
    "measure_rows": 40,
    "finish": 100,
    "finish_sketches": 150,
    "finish_few_bits": 150,
    "measure_sketches": 330,
    "accumulate": 60,
    "add_records": 170,
}
READ_ELEMENTS = {
    "measure",
    "measure_rows",
    "finish",
    "finish_sketches",
    "finish_few_bits",
    "accumulate",
    "add_records",
}
_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_LANES = 32
# What parameters of a kernel are, where they are not pointers to float32.
_TYPES = {
    **dict.fromkeys(["strips", "given", "vectors", "matrices", "addresses", "multipliers"], "*i64"),
    **dict.fromkeys(["old", "new", "x", "sketch", "sketches", "drawn"], "*bf16"),
    "records": "*u8",
    **dict.fromkeys(
        ["members", "num_columns", "num_rows", "num_blocks", "first_column", "width", "count",
         "elements", "blocks", "key_low", "key_high", "first_line", "first_number", "num_numbers"],
        "i32",
    ),
    "entry": "fp32",
}  # fmt: skip
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


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the compiler made of it."""

    registers: int
    stack: int
    """Bytes of spilled registers."""
    wide_loads: int
    """Of 128 bits."""
    per_element: float
    """Instructions inside loops, over a thread's elements of the tile."""


DENSE = {"BITS": 0, "DRAWN": 0, "DRAWN_PADDED": 16, "KEPT": 0}
RECORDS = {"BITS": 4, "DRAWN": 64, "DRAWN_PADDED": 64, "KEPT": 0}
SKETCHES = {**DENSE, "BITS": 32, "DRAWN": 16}
FEW_BITS = {**DENSE, "KEPT": 4}


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
            "WEIGHT": dtype, "MOMENTUM": tl.float32, "ALIGNED": True, **drawn,
        }  # fmt: skip
        sums = {"SUMS": 3 if rule == 2 else 2, "HISTORY": rule == 2, "SCALED": False}
        yield Variant(
            name=f"measure{'_sketches' if drawn['BITS'] else ''} {name}",
            kernel=measure,
            constants={**shared, **sums},
            options=EXPANDED_OPTIONS if drawn["BITS"] else MEASURE_OPTIONS,
            elements=TILE_ROWS * 64,
        )
        if rule == 0 and drawn == DENSE:
            yield from _of_rows(dtype)
        rows, options = finish_of(bits=drawn["BITS"], kept_bits=drawn["KEPT"])
        passed = {"ROWS": rows, "RULE": rule, "GROUP": 4, "WINDOW": 0, "TALLIES": 0, "ROUNDS": True}
        yield Variant(
            name=f"finish{kind} {name}",
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
                "GRADIENT": dtype, "ALIGNED": True,
            },
            options=ROW_OPTIONS,
            elements=step * width,
        )  # fmt: skip


def others() -> Iterator[Variant]:
    """Kernels over sums and over vectors, and the sketches of gradients."""
    options = {"num_warps": 4}
    sums = {"SUMS": 2, "HISTORY": False, "SCALED": False, "TILES": 16, "WIDTH": 128}
    for name, kernel, constants in (
        ("gather", gather, sums),
        ("settle", settle, {"SUMS": 2, "WIDTH": 1024}),
        ("scale", scale, {"RULE": 1, "CLIPS": True, "KNOWN": False, "SCALED": True,
            "NUMBERS": 6, "WIDTH": 128}),
    ):  # fmt: skip
        yield Variant(name=name, kernel=kernel, constants=constants, options=options, elements=0)
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


def made(variant: Variant, capability: int) -> Made:
    """Compile one for a GPU that is not here."""
    names, constants = variant.kernel.arg_names, variant.constants
    signature = {
        name: "constexpr" if name in constants else _TYPES.get(name, "*fp32") for name in names
    }
    # As a launch finds them: memory of torch's allocator, and columns that are multiples of 16.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in {"num_columns", "blocks"}
    }
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    target = GPUTarget("cuda", capability, _LANES)
    built = triton.compile(source, target=target, options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (_dump(option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    threads = _LANES * variant.options["num_warps"]
    per_thread = max(1, variant.elements // threads)
    return Made(
        registers=numbers["REG"],
        # A frame that nothing is written to is room for a call's return: no spill.
        stack=numbers["STACK"] + numbers["LOCAL"] if re.search(r"\bSTL\b", code) else 0,
        wide_loads=len(re.findall(r"LDG\S*\.128", code)),
        per_element=_in_loops(code) / per_thread,
    )


def _dump(option: str, path: str) -> str:
    command = [str(_BINARIES / "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _in_loops(code: str) -> int:
    """Instructions between a jump backwards and where it goes; of loops in loops once."""
    lines = re.findall(r"\n\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    inside: set[int] = set()
    places = [int(address, 16) for address, _ in lines]
    for place, (_, text) in zip(places, lines, strict=True):
        jump = re.search(r"BRA\S*\s.*?`?\(?\.?0x([0-9a-f]+)", text) or re.search(
            r"BRA\S*\s+(?:\S+,\s+)?0x([0-9a-f]+)", text
        )
        # A jump to itself fills the end of a kernel.
        if jump and int(jump.group(1), 16) < place:
            start = int(jump.group(1), 16)
            inside.update(other for other in places if start <= other <= place)
    return len(inside)


def broken(variant: Variant, found: Made) -> list[str]:
    """Which limits it breaks."""
    kind = variant.name.split()[0]
    registers = variant.options.get("maxnreg", LARGEST_REGISTERS)
    rules = {
        f"{found.stack} bytes of registers are spilled": found.stack > 0,
        f"{found.registers} registers are above {registers}": found.registers > registers,
        "no load is 128 bits wide": kind in READ_ELEMENTS and found.wide_loads == 0,
        f"{found.per_element:.0f} instructions per element": (
            found.per_element > LARGEST_PER_ELEMENT.get(kind, sys.maxsize)
        ),
    }
    return [rule for rule, is_broken in rules.items() if is_broken]


def main() -> int:
    """Print a table; the exit code is 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="blend in bf16, and what is small")
    parsed = parser.parse_args()
    chosen = list(variants(rules=(1,), dtypes=(tl.bfloat16,)))
    chosen = [each for each in chosen if each.kernel is finish]
    chosen += [each for each in _of_rows(tl.bfloat16) if each.constants["WIDTH"] == 4096]
    if not parsed.quick:
        chosen = list(variants(rules=(0, 1, 2, 3), dtypes=(tl.bfloat16, tl.float32, tl.float16)))
        for drawn in (RECORDS, SKETCHES, FEW_BITS):
            chosen += variants(rules=(0, 1, 2, 3), dtypes=(tl.bfloat16,), drawn=drawn)
    pairs = list(itertools.product(CAPABILITIES, chosen))
    small = [*others(), *of_records()]
    pairs += itertools.product((90,) if parsed.quick else CAPABILITIES, small)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(pool.map(lambda pair: made(pair[1], pair[0]), pairs))
    faults = 0
    print("kernel                  sm  registers  spilled  wide loads  instructions/element")
    for (capability, variant), found in zip(pairs, results, strict=True):
        print(
            f"{variant.name:22} {capability:3}  {found.registers:9}  {found.stack:7}  "
            f"{found.wide_loads:10}  {found.per_element:20.1f}"
        )
        for rule in broken(variant, found):
            faults += 1
            print(f"  BROKEN: {rule}")
    print(f"Triton {triton.__version__}: {len(pairs)} kernels, {faults} limits broken")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
