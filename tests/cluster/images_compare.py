# SPDX-License-Identifier: Apache-2.0
"""Compares runs with the run on one node: weights after the last step, loss of every step.

    python tests/cluster/images_compare.py BASELINE HALF.pt RUN...

A run is a folder of the trainer's, with its weights in BASELINE.pt. HALF.pt are the baseline's
weights half of the way: how far it moved since is the scale of all distances, and what a run that
did something else would be away.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

# The same sums in another order: fp32 rounds at 6e-8, a sum has some hundred terms, and 6 steps of
# an optimizer that divides by root mean squares enlarge it; measured 1.2e-6.
WEIGHTS = 1e-4
LOSSES = 1e-5


def weights(path: str) -> dict[str, torch.Tensor]:
    """Returns the model's parameters by name."""
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return model


def losses(run: str) -> list[float]:
    """Returns the training loss of every step, nats per token."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Returns the Euclidean distance between two models."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    return math.sqrt(sum(float((one[k].double() - other[k].double()).square().sum()) for k in one))


def main(baseline: str, half: str, *runs: str) -> int:
    """Returns 1 if a run differs."""
    final, expected = weights(f"{baseline}.pt"), losses(baseline)
    moved = distance(final, weights(half))
    assert moved > 0.1, f"the baseline must move to be compared with; it moved by {moved}"
    worst = 0
    for run in runs:
        away = distance(final, weights(f"{run}.pt")) / moved
        given = losses(run)
        off = max(abs(a - b) for a, b in zip(given, expected, strict=True))
        good = away <= WEIGHTS and off <= LOSSES * max(expected)
        worst |= not good
        sys.stdout.write(
            f"        {run}: {len(given)} steps, weights {away:.1e} of the movement away, "
            f"losses {off:.1e}{'' if good else ': TOO FAR'}\n"
        )
    return int(worst)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
