# SPDX-License-Identifier: Apache-2.0
"""Breaks each phase of the Triton kernels in turn, in a copy, and looks whether a check notices.

    python -m tests.kernels.gpu.mutations
    python -m tests.kernels.gpu.mutations --only records

In Triton's interpreter, some 10 s of CPU for each. The exit code is 1 where a check passes on
broken kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCES = Path("flora_dist/kernels/gpu")
CHECKS = {
    "blend": "runs.difference(runs.FIXED)",
    "flora": "runs.difference(runs.with_rule('flora', clip=0.01))",
    "strict": "runs.difference(runs.with_rule('flora_strict', clip=0.01))",
    "long rows": "runs.difference(runs.with_rule('none', scale_parameter=True))",
    "bits": "bits.wrong_bits('cpu')",
    "sketches": "sketch_runs.wrong_sketches('cpu')",
    "records": "record_runs.wrong_records('cpu', range(4))",
    "steps on sketches": "drawn_runs.wrong_steps('cpu', range(2))",
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
    "gather_update": Mutation(
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
        file="finish.py",
        old="* entry * (made - c), new_a)",
        new="* entry * made, new_a)",
        check="blend",
    ),
    "finish, window": Mutation(
        file="finish.py",
        old="moved = tl.dot(m, step",
        new="moved = tl.dot(-m, step",
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
        old="// num_columns + rows",
        new="// num_columns",
        check="steps on sketches",
    ),
}


def is_noticed(mutation: Mutation) -> bool:
    """Whether the check finds something."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "flora_dist", copy / "flora_dist", ignore=hidden)
        shutil.copytree(ROOT / "tests" / "kernels", copy / "tests" / "kernels", ignore=hidden)
        (copy / "tests" / "__init__.py").touch()
        path = copy / SOURCES / mutation.file
        text = path.read_text()
        assert text.count(mutation.old) == 1, (mutation.file, mutation.old)
        path.write_text(text.replace(mutation.old, mutation.new))
        environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        found = _ask(mutation.check, copy, environment)
        return bool(found)


def _ask(check: str, folder: Path, environment: dict[str, str]) -> str:
    """What a check has found, in the copy."""
    modules = "bits, drawn_runs, record_runs, runs, sketch_runs"
    code = f"from tests.kernels.gpu import {modules}\nprint({CHECKS[check]} or '')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
    )
    return done.stdout.splitlines()[-1]


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
