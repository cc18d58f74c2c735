# SPDX-License-Identifier: Apache-2.0
"""Everything that tests ask of the Triton kernels in the interpreter, by one process.

TRITON_INTERPRET=1 python -m tests.kernels.gpu.verdict --cases 8
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from flora_dist.core.state.settings import TWO_MOMENTS
from flora_dist.kernels.gpu.graph import record_graph
from tests.kernels.gpu import cut_runs, self_checked
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
    with_rule,
)
from tests.kernels.gpu.sketch_runs import wrong_sketches

BF16 = {"state_dtype": "bfloat16", "growth": 1.01, "clip": None}


def verdict(cases: range) -> dict[str, Any]:
    """All of it."""
    found = {seed: difference(small_case_of(seed)) for seed in cases}
    return {
        "cases": {str(seed): what for seed, what in found.items()},
        "fixed": difference(FIXED),
        "two moments": {rule: of_two_moments(rule) for rule in TWO_MOMENTS},
        "unnoticed": unnoticed(),
        "wrong cuts": wrong_cuts(range(6)),
        "wrong bits": wrong_bits(DEVICE),
        "wrong sketches": wrong_sketches(DEVICE),
        "wrong records": wrong_records(DEVICE, range(2)),
        "wrong steps on sketches": wrong_steps(DEVICE, range(1)),
        "self-check": self_checked.verdict(DEVICE),
        "by graph": by_graph(GRAPHED, record_graph if DEVICE == "cuda" else again),
    }


def of_two_moments(rule: str) -> str:
    """What steps by a rule part in that keeps two numbers where others keep one."""
    whole = with_rule(rule, rank=4, scale_parameter="relative")
    spanned, sharded = (
        cut_runs.with_rule(each, rule, rank=2) for each in (cut_runs.SPANNED, cut_runs.SHARDED)
    )
    in_bf16 = replace(whole, dtype=torch.bfloat16, settings={**whole.settings, **BF16})
    cuts = map(cut_runs.difference, (spanned, sharded))
    return "; ".join(filter(None, [difference(whole), difference(in_bf16), *cuts]))


def main() -> None:
    """Print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=8)
    print(json.dumps(verdict(range(parser.parse_args().cases))))


if __name__ == "__main__":
    main()
