# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, wide loads.

    python -m tests.kernels.gpu.lint            # every variant for sm_80, sm_90 and sm_100
    python -m tests.kernels.gpu.lint --quick    # the default settings alone, as the tests do
    python -m tests.kernels.gpu.lint --only measure --sm 80

Triton's wheel brings ptxas and cuobjdump. Kernels that were compiled before come from its cache.
The exit code is 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.gpu.variants import CAPABILITIES, Variant, everything, quick

# Limits are named by a variant's first words; the longest name counts.
# Two programs of 256 threads, or four of 128, share an SM's 65,536 registers; three of 128 where a
# kernel asks for 168. Triton 3.6 gives 138 to a measure and 168 to a record where 3.7 gives 128
# and 128 to 132; a cap of 168 makes 3.7 take them all, and spill on sm_100.
LARGEST_REGISTERS = {"": 128, "measure": 168, "add_records": 168}
# Of the loop over a tile. At 28e12 instructions of a lane per second (132 SMs of an H100 at
# 1.7 GHz) 100 take 3.5 ps, as long as 12 bytes take at its 3.35 TB/s.
LARGEST_PER_ELEMENT = {
    "measure": 60,
    "measure_rows": 40,
    "finish": 100,
    # Random rounding to fp16 counts in steps of numbers below 2^-14 too; with two moments beside it
    # arithmetic takes twice as long as memory on an H100.
    "finish fp16 rule 5": 110,
    "finish fp16 rule 6": 190,
    "finish_sketches": 150,
    # ``apollo`` scales a block once its sketch is known: until then the gradient stays, and changes
    # its place among the threads.
    "finish_sketches_scaled": 260,
    "finish_few_bits": 150,
    "measure_cut": 60,
    # Of cut rows alone; ``flora`` reads the old momentum's elements beside the sketch.
    "couple_cut": 75,
    "finish_cut": 110,
    "measure_sketches": 340,
    "accumulate": 60,
    "add_records": 170,
}
# Bytes of spilled registers: by Triton 3.6 on sm_80, and in sm_100's code.
LARGEST_SPILLED = {"": 0, "finish fp32 rule 2": 8}
SPILLED_ON_100 = {
    "": 0,
    "settle": 8,
    "measure_rows": 8,
    "measure_sketches": 24,
    "finish": 24,
    "finish fp16 rule 6": 104,
    "finish_sketches": 32,
}
READ_ELEMENTS = {
    "measure",
    "measure_rows",
    "finish",
    "finish_sketches",
    "finish_sketches_scaled",
    "finish_few_bits",
    "measure_cut",
    "couple_cut",
    "finish_cut",
    "accumulate",
    "add_records",
}
_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_LANES = 32
# What parameters of a kernel are, where they are not pointers to float32.
_TYPES = {
    **dict.fromkeys(["strips", "given", "vectors", "matrices", "addresses", "multipliers", "keys"],
                    "*i64"),
    **dict.fromkeys(["old", "new", "x", "sketch", "sketches", "drawn"], "*bf16"),
    "records": "*u8",
    **dict.fromkeys(
        ["members", "num_columns", "num_rows", "num_blocks", "first_column", "width", "count",
         "elements", "blocks", "groups", "key_low", "key_high", "first_line", "first_number",
         "num_numbers"],
        "i32",
    ),
    "entry": "fp32",
}  # fmt: skip


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


def _limit(limits: Mapping[str, int], variant: Variant) -> int:
    """That of the longest name that the variant's begins with, word by word."""
    words = f"{variant.name} "
    return limits[max((name for name in limits if words.startswith(f"{name} ".lstrip())), key=len)]


def broken(variant: Variant, found: Made, capability: int) -> list[str]:
    """Which limits it breaks."""
    kind = variant.name.split()[0]
    registers = variant.options.get("maxnreg", _limit(LARGEST_REGISTERS, variant))
    spilled = _limit(SPILLED_ON_100 if capability == 100 else LARGEST_SPILLED, variant)
    instructions = _limit({"": sys.maxsize, **LARGEST_PER_ELEMENT}, variant)
    rules = {
        f"{found.stack} bytes of registers are spilled": found.stack > spilled,
        f"{found.registers} registers are above {registers}": found.registers > registers,
        "no load is 128 bits wide": kind in READ_ELEMENTS and found.wide_loads == 0,
        f"{found.per_element:.0f} instructions per element": found.per_element > instructions,
    }
    return [rule for rule, is_broken in rules.items() if is_broken]


def main() -> int:
    """Print a table; the exit code is 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="blend in bf16, and what is small")
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    parser.add_argument("--sm", type=int, choices=CAPABILITIES, help="for one GPU alone")
    parsed = parser.parse_args()
    pairs = [
        (capability, variant)
        for capability, variant in (quick() if parsed.quick else everything())
        if variant.name.startswith(parsed.only) and parsed.sm in {None, capability}
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(pool.map(lambda pair: made(pair[1], pair[0]), pairs))
    faults = 0
    print("kernel                  sm  registers  spilled  wide loads  instructions/element")
    for (capability, variant), found in zip(pairs, results, strict=True):
        print(
            f"{variant.name:22} {capability:3}  {found.registers:9}  {found.stack:7}  "
            f"{found.wide_loads:10}  {found.per_element:20.1f}"
        )
        for rule in broken(variant, found, capability):
            faults += 1
            print(f"  BROKEN: {rule}")
    print(f"Triton {triton.__version__}: {len(pairs)} kernels, {faults} limits broken")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
