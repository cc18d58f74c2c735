# SPDX-License-Identifier: Apache-2.0
"""Every layout's checkpoint on every layout: how far the resumed runs end from the reference.

    python -m tests.checkpoint.matrix

Five steps on the layout of the row, then five on that of the column; fp32. Distance over the
movement of the worst parameter, in 1e-6; allowed are 20. On the diagonal: whether every bit of
weights and state is that of the run that was not interrupted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.battery.oracle import Case, distances, reference_run
from tests.battery.variants import differing
from tests.checkpoint.layouts import LAYOUTS, on_ranks, resume, save_half_way
from tests.conftest import _LAUNCHED, _POOLS

CASE = Case(dtype=torch.float32, settings={"weight_decay": 0.1})


def main() -> None:
    """Prints the table."""
    start, expected = reference_run(CASE)
    print(f"torch {torch.__version__}; worst parameter, 1e-6 of its movement\n")
    print(f"{'from, to':16}" + "".join(f"{name:>16}" for name in LAYOUTS))
    with tempfile.TemporaryDirectory() as home:
        for source in LAYOUTS:
            folder = Path(home) / source.replace(" ", "-")
            ends = on_ranks(source, save_half_way, CASE, folder)
            print(f"{source:16}", end="", flush=True)
            for target in LAYOUTS:
                found = on_ranks(target, resume, CASE, folder)
                if target == source:
                    pairs = zip(found, ends, strict=True)
                    is_same = not any(differing(mine, theirs) for mine, theirs in pairs)
                    cell = "bit for bit" if is_same else "DIFFERS"
                else:
                    own = [{n: end[n] for n in expected} for end in found]
                    worst = max(distances(start, expected, each)[1] for each in own)
                    cell = f"{1e6 * worst:.2f}"
                print(f"{cell:>16}", end="", flush=True)
            print()
    for pool in (*_POOLS.values(), *_LAUNCHED.values()):
        pool.close()


if __name__ == "__main__":
    # Ranks find a body by the name of its module, which must not be __main__.
    from tests.checkpoint import matrix

    matrix.main()
