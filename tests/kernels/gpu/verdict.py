# SPDX-License-Identifier: Apache-2.0
"""Everything that tests ask of the Triton kernels in the interpreter, by one process.

TRITON_INTERPRET=1 python -m tests.kernels.gpu.verdict --cases 8
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from flora_dist.kernels.gpu.graph import record_graph
from tests.kernels.gpu import self_checked
from tests.kernels.gpu.bits import wrong_bits
from tests.kernels.gpu.cut_runs import wrong_cuts
from tests.kernels.gpu.drawn_runs import wrong_steps
from tests.kernels.gpu.record_runs import wrong_records
from tests.kernels.gpu.runs import (
    DEVICE,
    FIXED,
    GRAPHED,
    again,
    by_graph,
    difference,
    small_case_of,
    unnoticed,
)
from tests.kernels.gpu.sketch_runs import wrong_sketches


def verdict(cases: range) -> dict[str, Any]:
    """All of it."""
    found = {seed: difference(small_case_of(seed)) for seed in cases}
    return {
        "cases": {str(seed): what for seed, what in found.items()},
        "fixed": difference(FIXED),
        "unnoticed": unnoticed(),
        "wrong cuts": wrong_cuts(range(6)),
        "wrong bits": wrong_bits(DEVICE),
        "wrong sketches": wrong_sketches(DEVICE),
        "wrong records": wrong_records(DEVICE, range(2)),
        "wrong steps on sketches": wrong_steps(DEVICE, range(1)),
        "self-check": self_checked.verdict(DEVICE),
        "by graph": by_graph(GRAPHED, record_graph if DEVICE == "cuda" else again),
    }


def main() -> None:
    """Print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=8)
    print(json.dumps(verdict(range(parser.parse_args().cases))))


if __name__ == "__main__":
    main()
