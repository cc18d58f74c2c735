# SPDX-License-Identifier: Apache-2.0
"""Prints the planner's bytes beside those of real runs, category by category.

    python -m tests.bench.plan                   all of it, in markdown
    python -m tests.bench.plan --only llama_9m   models that begin so

On two ranks with gloo; what is measured, and how: tests/planner/measured.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial

from flora_dist.cluster.planner.request import PURE
from tests.conftest import launched_pool_of
from tests.planner.compared import CATEGORIES, RANKS, measured, planned
from tests.planner.runs import Case

MODELS = ("llama_9m", "llama_60m")


def cases() -> Iterator[Case]:
    """What was promised, then what a user may ask besides."""
    for model in MODELS:
        for backend in ("fsdp2", "zero2"):
            for level in ("dense", "compressed"):
                for ratio in (8, 16):
                    yield Case(model=model, backend=backend, ratio=ratio, gradients=level)
    for backend in ("fsdp2", "zero2"):
        yield Case(model="llama_9m", backend=backend, ratio=8, precision="bfloat16")
        for level in ("dense", "compressed"):
            yield Case(model="llama_9m", backend=backend, ratio=8, gradients=level, accumulate=4)
        yield Case(model="llama_9m", backend=backend, ratio=8, gradients="fused")
    yield Case(model="llama_9m", backend="fsdp2", ratio=8, gradients="sharded", accumulate=4)
    for backend in ("ddp", "zero0", "zero1", "zero3"):
        yield Case(model="llama_9m", backend=backend, ratio=8)
    for backend in ("ddp", "zero1", "zero3"):
        yield Case(model="llama_9m", backend=backend, ratio=8, gradients="compressed")
    alone = partial(Case, model="llama_9m", ratio=16, accumulate=2, precision=PURE)
    for backend in ("zero1", "zero2", "zero3"):
        yield alone(backend=backend, gradients="compressed")
    yield alone(backend="fsdp2")


def row(case: Case, run: Mapping[str, int]) -> str:
    """Measured / planned / planned over measured, and the peak of the step beside the total."""
    plan = planned(case)
    cells = []
    for name in CATEGORIES:
        ratio = f" / {plan[name] / run[name]:.4f}" if run[name] else ""
        cells.append(f"{run[name]:,} / {plan[name]:,}{ratio}")
    peak = run["weights"] + run["state"] + max(run["in_backward"], run["in_step"])
    cells.append(f"{peak:,} / {plan['total']:,} / {plan['total'] / peak:.2f}")
    return f"| {case} | {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models that begin so")
    asked = parser.parse_args()
    print(f"| {' | '.join(('case', *CATEGORIES, 'peak / total'))} |")
    print(f"|{'---|' * (len(CATEGORIES) + 2)}")
    try:
        for case in cases():
            if case.model.startswith(asked.only):
                print(row(case, measured(case)), flush=True)
    finally:
        launched_pool_of(RANKS).close()


if __name__ == "__main__":
    main()
