# SPDX-License-Identifier: Apache-2.0
"""Random configurations and sequences of the optimizer against ``reference.py``.

    python -m tests.fuzz.optimizer --cases 2000 --seed 0
    python -m tests.fuzz.optimizer --cases 200 --seed 0 --ranks 2
    python -m tests.fuzz.optimizer --seed 0 --only 17

Prints each case that breaks with its number; the exit code is 1 if any does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from tests.fuzz.cases import SHARDED, WHOLE, WORLD_SIZE, Case, deal
from tests.fuzz.running import run_all
from tests.harness.ranks import RankError, RankPool

TOGETHER = 20
"""Cases of one call of a pool; of one that fails as a whole, each is tried alone."""
LONGEST_S = 120.0
TOLD_EVERY = 500

Broken = tuple[Case, list[str]]


def broken_of(cases: Sequence[Case], pool: RankPool | None) -> Iterator[Broken]:
    """The cases that part from the reference, each with what is wrong."""
    for first in range(0, len(cases), TOGETHER):
        batch = cases[first : first + TOGETHER]
        answers = run_all(batch) if pool is None else _on_ranks(pool, batch)
        yield from ((case, wrong) for case, wrong in zip(batch, answers, strict=True) if wrong)


def _on_ranks(pool: RankPool, cases: Sequence[Case]) -> list[list[str]]:
    try:
        answers = pool(run_all, cases, timeout=LONGEST_S)
    except RankError as error:
        if len(cases) == 1:
            return [[str(error)]]
        return [wrong for case in cases for wrong in _on_ranks(pool, [case])]
    return [
        [f"rank {rank}: {each}" for rank, wrong in enumerate(one) for each in wrong]
        for one in zip(*answers, strict=True)
    ]


def main() -> None:
    """Run the cases and say which broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, choices=(1, WORLD_SIZE), default=1)
    parser.add_argument("--only", type=int, help="the number of one case")
    asked = parser.parse_args()
    numbers = range(asked.cases) if asked.only is None else [asked.only]
    cases = [deal(asked.seed, number, ranks=asked.ranks) for number in numbers]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # as tests/conftest.py says
    pool = RankPool(WORLD_SIZE) if asked.ranks > 1 else None
    broken = 0
    try:
        for first in range(0, len(cases), TOLD_EVERY):
            for case, wrong in broken_of(cases[first : first + TOLD_EVERY], pool):
                broken += 1
                sys.stdout.write(f"BROKEN {case.label} ({case.layout})\n")
                sys.stdout.writelines(f"    {each}\n" for each in wrong)
                sys.stdout.flush()
            done = min(first + TOLD_EVERY, len(cases))
            sys.stdout.write(f"{done} of {len(cases)} cases, {broken} broken\n")
            sys.stdout.flush()
    finally:
        if pool is not None:
            pool.close()
    layouts = Counter(case.layout for case in cases)
    said = ", ".join(
        f"{layout} {layouts[layout]}" for layout in (WHOLE, *SHARDED) if layouts[layout]
    )
    steps = sum(len(case.moments) for case in cases)
    sys.stdout.write(f"{said}; {steps} steps; {broken} broken\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
