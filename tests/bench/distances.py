# SPDX-License-Identifier: Apache-2.0
"""How far each layout is from `reference.py` after 10 steps, over what the parameters moved.

    python -m tests.bench.distances

The battery of `tests/battery` asserts bounds on these numbers; this prints them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.battery import layouts
from tests.battery.oracle import Case, distances, reference_run
from tests.battery.test_layouts import EXACT_CASES, FLOAT_CASES
from tests.conftest import pool_of

Run = tuple[dict[str, Tensor], dict[str, Tensor]]


def worst(layout: str, cases: list[Case], expected: dict[str, Run]) -> tuple[float, float]:
    """(whole model, worst parameter), each the largest over the cases."""
    found = []
    for case in cases:
        if layout == "one process":
            weights = layouts.on_plain(case)
        else:
            world_size, _ = layouts.LAYOUTS[layout]
            weights = pool_of(world_size)(layouts.run, layout, case)[0]
        found.append(distances(*expected[str(case)], weights))
    return max(whole for whole, _ in found), max(one for _, one in found)


def main() -> None:
    """Print one line per layout."""
    expected = {str(case): reference_run(case) for case in (*EXACT_CASES, *FLOAT_CASES)}
    print(
        f"torch {torch.__version__}; {len(EXACT_CASES)} settings in fp64, "
        f"{len(FLOAT_CASES)} in fp32"
    )
    print(f"{'layout':16} {'fp64, worst parameter':>22} {'fp32, model':>12} {'fp32, worst':>12}")
    for layout in ("one process", *layouts.LAYOUTS):
        _, exact = worst(layout, EXACT_CASES, expected)
        whole, one = worst(layout, FLOAT_CASES, expected)
        print(f"{layout:16} {exact:22.1e} {whole:12.1e} {one:12.1e}", flush=True)


if __name__ == "__main__":
    main()
