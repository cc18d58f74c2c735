# SPDX-License-Identifier: Apache-2.0
"""Steps on gradients that are known by sketches, by the Triton kernels and by torch's operators.

    TRITON_INTERPRET=1 python -m tests.kernels.gpu.drawn_runs --cases 100 --seed 0

Sketches are in few bits or in float32, times a factor; both ways step on the same ones. The
momentum is in few bits too, or in full. The exit code is 1 where they part.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch

from flora_dist.core.records import Code
from flora_dist.core.state.settings import TWO_MOMENTS, FloraConfig
from flora_dist.kernels.gpu.choice import make_phases
from flora_dist.kernels.gpu.self_check import Trial, fault
from flora_dist.kernels.gpu.trial_layouts import COLUMNS, SPAN, WHOLE
from tests.kernels.gpu.record_runs import DEVICE
from tests.kernels.paths import scaling


def trial_of(seed: int, device: str) -> Trial:
    """A random one; the same for a seed."""
    draw = random.Random(seed)
    block = draw.choice([16, 16, 32])
    config = FloraConfig(
        state_bits=draw.choice([32, 32, 8, 4]),
        momentum=draw.choice(["blend", "ademamix", "flora", "flora_strict", "none"]),
        rank=draw.choice([None, 4]),
        block=block,
        kappa=2,
        clip=draw.choice([None, 0.3]),
        scale_parameter=scaling(draw.random()),
    )
    matrices = draw.choice([(), (), (2,)])
    trial = Trial(
        shape=(*matrices, draw.randint(2, 20), draw.randint(block, 2 * block)),
        cut=draw.choice([WHOLE, SPAN, COLUMNS]),
        config=config,
        maximize=draw.random() < 0.3,
        dtype=draw.choice([torch.float32, torch.bfloat16]),
        gradient_dtype=torch.float32,
        sketch=Code(bits=draw.choice([32, 8, 4, 4, 2]), numbers=draw.choice([9, block])),
        sketch_block=block,
        device=torch.device(device),
    )
    if draw.random() < 0.3:
        config = replace(config, momentum=draw.choice(TWO_MOMENTS), state_bits=None, rank=2)
    return replace(trial, config=config)


def trials_of(seed: int, device: str) -> Iterable[Trial]:
    """One, and without a momentum in few bits, which rounds all that follows from it."""
    trial = trial_of(seed, device)
    in_full = replace(trial, config=replace(trial.config, state_bits=32))
    return dict.fromkeys([in_full, trial])


def wrong_steps(device: str, seeds: Iterable[int]) -> list[str]:
    """Which random runs part; empty if none does."""
    trials = [(seed, each) for seed in seeds for each in trials_of(seed, device)]
    return [f"seed {s}: {what}; {each}" for s, each in trials if (what := fault(each, make_phases))]


def main() -> int:
    """Print each run that parts; the exit code is 1 if any does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    wrong = wrong_steps(DEVICE, range(parsed.seed, parsed.seed + parsed.cases))
    print("\n".join([*wrong, f"{parsed.cases} cases on {DEVICE}, {len(wrong)} broken"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
