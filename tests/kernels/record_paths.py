# SPDX-License-Identifier: Apache-2.0
"""The same steps on gradients in few bits by the compiled kernels and by torch's operators.

    python -m tests.kernels.record_paths --cases 500 --seed 0

Both step on the same records, which torch's operators have made. The exit code is 1 where the two
paths part.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings

import torch
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from flora_dist.core.records import SCALE_BYTES, Code
from flora_dist.core.sketch.quantise import read_records
from flora_dist.gradients.cycle import Gradients
from tests.kernels import paths
from tests.kernels.paths import LARGEST_DISTANCE, LEAST_TIES, STEPS, Case, fed_by_ties, parted, path

MICRO_BATCHES = 2
MOST_TIES = 0.01
"""Of a momentum's blocks: some 1e-6 of a number, over its step in 8 bits, and as much of a scale's
step, in each of 64 numbers and steps."""


def case_of(seed: int) -> Case:
    """A random case; the same for a seed."""
    case, draw = paths.case_of(seed), random.Random(-1 - seed)
    rule = case.settings["momentum"]
    settings = case.settings | {
        "sketch": "hadamard",
        # Two moments share no scale, and gradients in few bits no whole tiles.
        "momentum": {"subspace_adam": "blend", "apollo": "flora"}.get(rule, rule),
        "orthogonalise": None,
        "gradient_bits": draw.choice([16, 8, 4, 2, 1]),
        "gradient_rank": draw.choice([None, None, case.settings["block"] // 2]),
        "max_norm": draw.choice([None, 0.5]),
        "state_bits": draw.choice([None, None, 8, 4]),
    }
    if settings["state_bits"] is not None:
        settings["state_dtype"] = "float32"
        # With fewer numbers nothing may come to a block's momentum. It is 0.9 of what it was then,
        # for one scale in ten exactly another scale, and rounding in float32 decides which.
        settings["gradient_rank"] = None
    # Numbers in few bits may cancel: a matrix of one row is divided by its own square, and where
    # that is zero but for the order of sums, the two paths have any sign. So have columns of a few
    # rows in one or two bits, once a factor of clipping has rounded each number.
    if settings["gradient_bits"] <= 2:
        settings["max_norm"] = None
    shapes = tuple(
        (2, *shape[1:]) if shape[0] == 1 and len(shape) == 2 else shape for shape in case.shapes
    )
    return Case(seed=seed, shapes=shapes, dtype=case.dtype, settings=settings)


def run(case: Case, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, and the state's tensors among the latter, records of every step."""
    torch.manual_seed(case.seed)
    settings = dict(case.settings)
    keys = ("gradient_bits", "gradient_rank", "max_norm")
    bits, rank, norm = (settings.pop(key, None) for key in keys)
    model = nn.ParameterDict(
        {f"p{i}": (0.02 * torch.randn(shape)).to(case.dtype) for i, shape in enumerate(case.shapes)}
    )
    weights = dict(model.named_parameters())
    start = {key: weight.detach().clone() for key, weight in weights.items()}
    optimizer = Flora(weights.items(), **settings)
    if bits is not None:
        flora_dist.attach(model, optimizer, "compressed", gradient_bits=bits, gradient_rank=rank)
    records: dict[str, Tensor] = {}
    for step in range(STEPS):
        with path("torch"):
            _add(optimizer, weights)
        with path(name):
            if norm is not None:
                optimizer.clip_grad_norm_(norm)
            optimizer.step()
        optimizer.zero_grad()
        for key, weight in weights.items():
            kept = optimizer.state[weight].get("momentum")
            if kept is not None and kept.dtype == torch.uint8:
                records[f"{key}.momentum.{step}"] = kept.clone()
    found = {key: weight.detach() for key, weight in weights.items()}
    for key, weight in weights.items():
        own = optimizer.state[weight]
        tensors = {k: v for k, v in own.items() if isinstance(v, Tensor)}
        found |= {f"{key}.{k}": v for k, v in tensors.items() if v.dtype != torch.uint8}
    return start, found | records


def _add(optimizer: Flora, weights: dict[str, nn.Parameter]) -> None:
    gradients = optimizer.gradients
    flows = gradients.flows if isinstance(gradients, Gradients) else {}
    for _ in range(MICRO_BATCHES):
        for key, weight in weights.items():
            gradient = torch.randn_like(weight)
            if (flow := flows.get(key)) is not None:
                assert isinstance(gradients, Gradients)
                gradients.take(flow, gradient)
            else:
                weight.grad = gradient


def difference(case: Case) -> str:
    """What the two paths part in; empty where they agree."""
    start, expected = run(case, "torch")
    found = run(case, "native")[1]
    for key in [key for key, value in expected.items() if value.dtype == torch.uint8]:
        own, other = (
            _values(side.pop(key), case.settings["state_bits"]) for side in (found, expected)
        )
        # A block that cancels to zero but for the order of sums has a scale of such size.
        blocks = ((own - other).abs() > LARGEST_DISTANCE * other.square().mean().sqrt()).any(-1)
        if blocks.sum() > MOST_TIES * blocks.numel() + LEAST_TIES:
            return f"{key}: {int(blocks.sum())} of {blocks.numel()} blocks differ"
        # Elements follow a momentum that was rounded to the other side, and keep what it moved them
        # by where the next rounding takes that back.
        weight = key.partition(".momentum")[0]
        follows = fed_by_ties(blocks.unsqueeze(-1))(expected[weight])
        found[weight][follows] = expected[weight][follows]
    return parted(case, start, expected, found)


def _values(records: Tensor, bits: int) -> Tensor:
    code = Code(bits=bits, numbers=(records.shape[-1] - SCALE_BYTES) * 8 // bits)
    return read_records(records, code, torch.float32)


def main() -> int:
    """Print each case that parts; the exit code is 1 if any does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    broken = 0
    for seed in range(parsed.seed, parsed.seed + parsed.cases):
        if what := difference(case_of(seed)):
            broken += 1
            print(f"seed {seed}: {what}; {case_of(seed)}")
    print(f"{parsed.cases} cases, {broken} broken")
    return int(broken > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of rounding in few bits that costs more than it saves
    sys.exit(main())
