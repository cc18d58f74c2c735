# SPDX-License-Identifier: Apache-2.0
"""Breaks each phase of the kernels in turn, in a copy, and looks whether a test notices.

    python -m tests.kernels.mutations
    python -m tests.kernels.mutations --only "finish, whole blocks"

Each one compiles the copy and runs one test, some 20 s of CPU. The exit code is 1 where a test
passes on broken kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels.mutation import BOUNDED, FIXED, ROOT, SOURCES, Mutation
from tests.kernels.mutations_of_updates import OF_UPDATES

SKETCHING = "tests/kernels/test_sketching.py"
RECORDS = "tests/kernels/test_records.py"
STEP_ON_RECORDS = "tests/kernels/test_record_paths.py"
SPANS = "tests/battery/test_layouts.py::test_a_layout_equals_the_reference_in_float32"


MUTATIONS = {
    **OF_UPDATES,
    "measure, sums by column": Mutation(
        file="measure.h", old="sum += square;", new="sum += 0.99f * square;", test=FIXED
    ),
    "measure, rows": Mutation(
        file="measure.h", old="now.beta2 * old + now", new="0.99f * old + now", test=FIXED
    ),
    "measure, old momentum": Mutation(
        file="measure.h",
        old="squares += e[v] * e[v];",
        new="squares += e[v];",
        test=FIXED,
        select="flora",
    ),
    "sketch, scaled before its sums": Mutation(
        file="hadamard.h",
        old="take(b, r, h.scale * lane_sums(t));",
        new="for (Long& each : t) each = h.scale * each; take(b, r, lane_sums(t));",
        test="tests/kernels/test_paths.py::test_random_runs_are_the_same_by_kernels_and_by_torch",
        select="1107 or 1896",
    ),
    "settle": Mutation(
        file="settle.cpp", old="root * (1 / std::sqrt", new="root * (0.99f / std::sqrt", test=FIXED
    ),
    "measure, cut rows": Mutation(
        file="measure.h",
        old="(tile.row_slot + at[r]) * size.num_columns + tile.first;",
        new="(tile.row_slot + at[r]) * size.num_columns;",
        test=SPANS,
        select="flat",
    ),
    "settle, norms of cut rows": Mutation(
        file="settle.cpp",
        old="whole.squares[place + j] += x * x;",
        new="whole.squares[place + j] += 0;",
        test=SPANS,
        select="flat",
    ),
    "settle, cut blocks": Mutation(
        file="settle.cpp",
        old="(line[start + j] * scale * own_factor[start + j]);",
        new="(line[start + j] * scale);",
        test=SPANS,
        select="flat",
    ),
    "couple, cut rows": Mutation(
        file="measure.h",
        old="squares += square_sum(room.x + skip, count);",
        new="squares += 0;",
        test=SPANS,
        select="columns",
    ),
    "couple, cut blocks": Mutation(
        file="finish.h",
        old="to[r] = whole[r] * u.factor;",
        new="to[r] = 0;",
        test=SPANS,
        select="flat",
    ),
    "tally": Mutation(
        file="local.h",
        old="squares_ - own_.first_tile, 1));",
        new="squares_ - own_.first_tile, 1) / 2);",
        test=FIXED,
        select="strict",
    ),
    "finish, whole blocks": Mutation(
        file="whole.h",
        old="keep * load_long(x + j) + e[v];",
        new="keep * load_long(x + j) - e[v];",
        test=FIXED,
    ),
    "finish, a block that a row's end cuts": Mutation(
        file="whole.h",
        old="if (v * kWidth < columns) y[v]",
        new="if (v * kWidth <= columns) y[v]",
        test=FIXED,
    ),
    "finish, no momentum": Mutation(
        file="whole.h",
        old="store(weight + at, kept - w.rate * update",
        new="store(weight + at, kept - 0.99f * w.rate * update",
        test=FIXED,
        select="none",
    ),
    "finish, any blocks": Mutation(
        file="finish.h",
        old="rounded(keep * load(w + j)) - rate * load(update + j)",
        new="rounded(keep * load(w + j)) - rate",
        test=FIXED,
    ),
    "finish, window": Mutation(
        file="finish.h",
        old="sum += from[k * padded + r] * load8(move_RP",
        new="sum -= from[k * padded + r] * load8(move_RP",
        test=FIXED,
    ),
    "finish, added average": Mutation(
        file="whole.h",
        old="kRule == kMix   ? now.gain * fresh",
        new="kRule == kMix   ? now.gain * compressed",
        test=FIXED,
        select="ademamix",
    ),
    "settle, growth": Mutation(
        file="settle.cpp", old="growth * last : norm", new="last : norm", test=BOUNDED
    ),
    "settle, normalise": Mutation(
        file="settle.cpp",
        old="if (size.normalise == kFactored)",
        new="if (size.normalise != kRows)",
        test=BOUNDED,
    ),
    "vectors, measure": Mutation(
        file="vector.h",
        old="clipped += square_sum(x, chunk.count);",
        new="clipped += 0;",
        test=FIXED,
    ),
    "vectors, finish": Mutation(
        file="vector.h",
        old="old[j] = (1 - now.beta1) * (x[j] * factor)",
        new="old[j] = now.beta1 * (x[j] * factor)",
        test=FIXED,
    ),
    "rounding": Mutation(
        file="philox.h",
        old="k0 += 0x9E3779B9u;",
        new="k0 += 0x9E3779B8u;",
        test=FIXED,
        select="bfloat16",
    ),
    "sketched sums": Mutation(
        file="gradients.h",
        old="sums[r] += numbers[k * padded + r];",
        new="sums[r] = numbers[k * padded + r];",
        test=SKETCHING,
        select="sum_is_that",
    ),
    "random words": Mutation(
        file="gradients.cpp",
        old="first + line % rows * stride + start",
        new="first + line % rows * stride",
        test=SKETCHING,
        select="random_words",
    ),
    "records, rotation": Mutation(
        file="rotation.h",
        old="memcpy(&bits, from + at[r], sizeof bits);",
        new="memcpy(&bits, from + r, sizeof bits);",
        test=RECORDS,
        select="summed_gradients",
    ),
    "records, rotation back": Mutation(
        file="rotation.h",
        old="to[o.rows[r]] = c[r];",
        new="to[r] = c[r];",
        test=STEP_ON_RECORDS,
        select="fixed",
    ),
    "records, reading": Mutation(
        file="octets.h",
        old="(scale < 0 ? 256 * code.per_octet : 0)",
        new="0",
        test=RECORDS,
        select="merged",
    ),
    "records, rounding": Mutation(
        file="records.h",
        old="+ 0.5f) * (1.0f / 65536);",
        new="+ 0.5f) * (1.0f / 131072);",
        test=RECORDS,
        select="rounded_numbers",
    ),
    "records, scale": Mutation(
        file="records.h",
        old="(own + 0xFFFF) >> 16;",
        new="(own + 0x7FFF) >> 16;",
        test=RECORDS,
        select="rounded_numbers",
    ),
    "records, levels": Mutation(
        file="records.h",
        old="level = pick(levels.values, steps);",
        new="level = pick(levels.values, steps & 6);",
        test=RECORDS,
        select="at_levels",
    ),
    "records, sum of a block": Mutation(
        file="records.h",
        old="{ return a + b; }));",
        new="{ return a + 2 * b; }));",
        test=RECORDS,
        select="at_levels",
    ),
    "records, sum of a block of 64": Mutation(
        file="records.h",
        old="sums[v] += sums[v + half];",
        new="sums[v] += 2 * sums[v + half];",
        test=RECORDS,
        select="at_levels and 64",
    ),
    "records, sum of a large block": Mutation(
        file="records.h",
        old="load(x + i) + load(x + half + i));",
        new="load(x + i) + 2 * load(x + half + i));",
        test=RECORDS,
        select="at_levels and 100",
    ),
    "records, values of 8 bits": Mutation(
        file="octets.h",
        old="odd * kFine) * size;",
        new="odd * 0.5f * kFine) * size;",
        test=RECORDS,
        select="read_as",
    ),
    "records, packing order": Mutation(
        file="octets.h",
        old="word |= word >> half * (8 - kBits);",
        new="word |= word >> (half * (8 - kBits) - kBits / 4);",
        test=RECORDS,
        select="rounded_numbers",
    ),
    "records, whose line": Mutation(
        file="records.h",
        old="draws.lines[line] * per_line + first",
        new="line * per_line + first",
        test=RECORDS,
        select="rounded_numbers",
    ),
    "records, what was kept": Mutation(
        file="quantised.h",
        old="add_numbers(room.numbers, room.others, count * code.room);",
        new="",
        test=RECORDS,
        select="summed_gradients",
    ),
    "records, sum over ranks": Mutation(
        file="quantised.h",
        old="if (n > 0) add_numbers",
        new="if (n > 1) add_numbers",
        test=RECORDS,
        select="merged",
    ),
    "records, factor": Mutation(
        file="lines.h",
        old="room.record[r] *= *factor;",
        new="room.record[r] *= 0.99f * *factor;",
        test=STEP_ON_RECORDS,
        select="fixed",
    ),
    "records of a momentum": Mutation(
        file="finish.h",
        old="values + (k + n) * rank, sizeof(float) * rank);",
        new="values, sizeof(float) * rank);",
        test=STEP_ON_RECORDS,
        select="fixed",
    ),
    "records of a momentum, whole blocks": Mutation(
        file="whole.h",
        old="p.counter + before / kIntegersPerCounter",
        new="p.counter",
        test=STEP_ON_RECORDS,
        select="few_bits",
    ),
}


def is_noticed(mutation: Mutation) -> bool:
    """Whether the test fails on the broken kernels."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        hidden = shutil.ignore_patterns("__pycache__", "*.so")
        for name in ("flora_dist", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=hidden)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / SOURCES / mutation.file
        text = path.read_text()
        assert text.count(mutation.old) == 1, (mutation.file, mutation.old)
        path.write_text(text.replace(mutation.old, mutation.new))
        compiler = copy / "flora_dist/kernels/compiler.py"
        compiler.write_text(compiler.read_text().replace('"-O3"', '"-O1"'))  # compiles sooner
        environment = {**os.environ, "PYTHONPATH": str(copy), "FLORA_DIST_KERNELS": "native"}
        _run(["-m", "flora_dist.kernels.build"], copy, environment).check_returncode()
        test = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]
        if mutation.select:
            test += ["-k", mutation.select]
        done = _run(test, copy, environment)
        if done.returncode not in (0, 1):
            raise RuntimeError(
                f"the test must run; it ended with {done.returncode}:\n{done.stdout}"
            )
        return done.returncode == 1


def _run(
    words: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


def main() -> int:
    """Print each mutation; the exit code is 1 if one goes unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name holds this")
    parsed = parser.parse_args()
    missed = 0
    for name, mutation in MUTATIONS.items():
        if parsed.only not in name:
            continue
        noticed = is_noticed(mutation)
        missed += not noticed
        print(f"{name}: {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
