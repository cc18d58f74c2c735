# SPDX-License-Identifier: Apache-2.0
"""The same run by the compiled kernels and by torch's operators, on random parameters and settings.

    python -m tests.kernels.paths --cases 2000 --seed 0

The exit code is 1 where the two paths part.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.core.state.settings import PROJECTED, TWO_MOMENTS
from flora_dist.kernels.presence import VARIABLE

STEPS = 4
# Of the movement, per parameter: sums of fp32 taken in another order part by some 1e-6 of what is
# summed. Weights begin small beside a step, or the rounding of W - lr U alone would be seen.
LARGEST_DISTANCE = 2e-5
# Where roundings grow, the paths may part by more, and a third run in float64 judges: small
# singular values of a tile are made large with their roundings, and a sketched number that is zero
# but for them, some 1e-7, is divided by the root of its eps. Torch's operators have been 2e-6 to
# 2e-3 from float64 there, and kernels 0.15 to 1.8 times as far.
FURTHER_THAN_TORCH = 8.0
# A number of the momentum that bf16 rounds to the other side moves its elements by 2^-8 of theirs.
LARGEST_BF16_DISTANCE = 2.0**-8
# Rounding turns a difference into a step of the grid where a threshold lies between the two: with
# the chance of difference over step. Of a number they are some 1e-6 and, in fp16, 2^-11 to 2^-10;
# steps of bf16 are eight times as large.
CHANCE = {torch.float16: 0.0025 * STEPS, torch.bfloat16: 0.0005 * STEPS}
# Ties are counted, and a count scatters by its root; the whole number above has room for few.
DEVIATIONS, LEAST_TIES = 5.0, 3.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    seed: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    settings: dict[str, Any]


def case_of(seed: int) -> Case:
    """A random case; the same for a seed."""
    draw = random.Random(seed)
    shapes = tuple(_shape(draw) for _ in range(draw.randint(1, 6)))
    momentum = draw.choice([*PROJECTED, "none", "flora", "flora_strict", "apollo"])
    laws = ["hadamard"] if momentum in PROJECTED else ["hadamard", "gaussian", "rademacher"]
    kinds = ["factored", "factored", "rows", "columns"]
    block = draw.choice([8, 16, 64])
    settings = {
        "lr": 10 ** draw.uniform(-2, -1),
        "momentum": momentum,
        "sketch": draw.choice(laws),
        "block": block,
        "rank": draw.choice([None, 1, 2, block // 8, block // 4]),
        "beta1": draw.choice([0.0, 0.9]),
        "kappa": draw.choice([2, 1000]),
        "transfer": draw.choice(["shrink", "reset"]),
        "beta2": draw.choice([None, 0.99]),
        "clip": draw.choice([None, 0.3, 1.0]),
        "growth": draw.choice([None, None, 1.01]),
        "normalise": "factored" if momentum in TWO_MOMENTS else draw.choice(kinds),
        "blend_gain": draw.choice([None, 1.0, 3.0]),
        "weight_decay": draw.choice([0.0, 0.1]),
        "scale_parameter": scaling(draw.random()),
        "state_dtype": draw.choice(["float32", "float32", "bfloat16"]),
        "maximize": draw.random() < 0.2,
        "seed": draw.randint(0, 9),
    }
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    if dtype == torch.float32:  # a low rank leaves most of a tile to rounding, which 16 bits show
        settings["orthogonalise"] = draw.choice([None, 2, 16, 64, 100])
    return Case(seed=seed, shapes=shapes, dtype=dtype, settings=settings)


def scaling(chance: float) -> bool | str:
    """A value of ``scale_parameter`` for a number in [0, 1)."""
    return "relative" if chance > 0.8 else chance < 0.3


def _shape(draw: random.Random) -> tuple[int, ...]:
    kind = draw.choice(["matrix", "matrix", "repeated", "experts", "convolution", "vector"])
    rows, columns = draw.randint(1, 90), draw.randint(1, 300)
    if kind == "repeated":
        return (24, 64)
    if kind == "experts":
        return (draw.randint(1, 4), rows, max(8, columns))
    if kind == "convolution":
        return (rows, draw.randint(1, 9), 3, 3)
    return (columns,) if kind == "vector" else (rows, columns)


@contextmanager
def path(name: str) -> Iterator[None]:
    """Plans made inside are stepped by ``native`` or ``torch``."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def run(case: Case, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, and the state's tensors among the latter."""
    torch.manual_seed(case.seed)
    weights = {
        f"p{index}": nn.Parameter((0.02 * torch.randn(shape)).to(case.dtype))
        for index, shape in enumerate(case.shapes)
    }
    start = {key: weight.detach().clone() for key, weight in weights.items()}
    with path(name):
        optimizer = Flora(weights.items(), **case.settings)
        for _ in range(STEPS):
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape).to(weight)
            optimizer.step()
    found = {key: weight.detach() for key, weight in weights.items()}
    for key, weight in weights.items():
        own = optimizer.state[weight]
        found |= {f"{key}.{k}": v for k, v in own.items() if isinstance(v, Tensor)}
    return start, found


def difference(case: Case) -> str:
    """What the two paths part in; empty where they agree."""
    start, expected = run(case, "torch")
    found = run(case, "native")[1]
    return judged(case, start, expected, found, lambda exact: run(exact, "torch")[1])


def judged(
    case: Case,
    start: dict[str, Tensor],
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    run_by_torch: Callable[[Case], dict[str, Tensor]],
) -> str:
    """The same of two runs that were made; ``run_by_torch`` makes a third where roundings grow."""
    what = parted(case, start, expected, found)
    if what and case.dtype == torch.float32 and _grows(case):
        exact = run_by_torch(replace(case, dtype=torch.float64))
        return _further(start, expected, found, exact)
    return what


def _grows(case: Case) -> bool:
    """Whether roundings of such a run do."""
    return bool(case.settings.get("orthogonalise")) or case.settings["momentum"] in TWO_MOMENTS


def _further(
    start: dict[str, Tensor],
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
) -> str:
    """What the kernels have much further from a run in float64 than torch's operators do."""
    for key, true in exact.items():
        moved = (true.double() - start.get(key, torch.zeros(())).double()).norm()
        own, other = (
            ((side[key].double() - true.double()).norm() / moved).item()
            for side in (found, expected)
        )
        if not own <= max(LARGEST_DISTANCE, FURTHER_THAN_TORCH * other):
            return (
                f"{key}: {own:.2e} of the movement from float64, by torch's operators {other:.2e}"
            )
    return ""


def parted(
    case: Case, start: dict[str, Tensor], expected: dict[str, Tensor], found: dict[str, Tensor]
) -> str:
    """What two runs part in; empty where they agree."""
    is_rounded = case.settings.get("state_dtype") == "bfloat16"
    largest = LARGEST_BF16_DISTANCE if is_rounded else LARGEST_DISTANCE
    for key, other in expected.items():
        own = found[key]
        if own.dtype in CHANCE:
            momenta = (side.get(f"{key}.momentum") for side in (expected, found))
            moved_on = fed_by_ties(_differing(*momenta))
            if what := _ties(own, other, start.get(key, other), moved_on):
                return f"{key}: {what}"
            continue
        moved = other.double() - start.get(key, torch.zeros(())).double()
        distance = ((own.double() - other.double()).norm() / moved.norm()).item()
        if not distance <= largest:
            return f"{key}: {distance:.2e} of the movement"
    return ""


def _ties(own: Tensor, other: Tensor, start: Tensor, moved_on: Callable[[Tensor], Tensor]) -> str:
    """What two runs differ in beyond roundings to the other side; empty if nothing.

    ``moved_on``: which numbers of a tensor like these differ for another reason than a tie.
    """
    differs = own != other
    ties = int((differs & ~moved_on(other)).sum())
    count = CHANCE[own.dtype] * other.numel()
    if ties > count + DEVIATIONS * count**0.5 + LEAST_TIES:
        return f"{ties} of {other.numel()} numbers differ"
    # A tie is one step of the grid, of the largest number at most; a few steps may tie alike.
    step = torch.finfo(own.dtype).eps * max(other.abs().max().item(), start.abs().max().item())
    furthest = (own.double() - other.double()).abs().max().item()
    return f"a number is {furthest / step:.1f} steps away" if furthest > STEPS * step else ""


def fed_by_ties(differs: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Elements whose momentum was rounded to the other side: they follow it, and tie in plenty.

    Given which numbers of the momentum differ, or which blocks (..., 1).
    """

    def fed(elements: Tensor) -> Tensor:
        if differs is None:
            return torch.zeros(elements.shape, dtype=torch.bool)
        if differs.shape == elements.shape:  # dense
            return differs
        blocks = differs.any(-1)
        lines = elements.reshape(*blocks.shape[:-1], -1)
        block = -(-lines.shape[-1] // blocks.shape[-1])
        block = 1 << (block - 1).bit_length()  # a power of two; the last one may be cut
        return blocks.repeat_interleave(block, -1)[..., : lines.shape[-1]].reshape(elements.shape)

    return fed


def _differing(other: Tensor | None, own: Tensor | None) -> Tensor | None:
    """Where two momenta in bfloat16 do."""
    if other is None or own is None or own.dtype != torch.bfloat16:
        return None
    return own != other


def main() -> int:
    """Print each case that parts; the exit code is 1 if any does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    broken = 0
    for seed in range(parsed.seed, parsed.seed + parsed.cases):
        case = case_of(seed)
        if what := difference(case):
            broken += 1
            print(f"seed {seed}: {what}; {case}")
    print(f"{parsed.cases} cases, {broken} broken")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
