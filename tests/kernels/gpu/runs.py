# SPDX-License-Identifier: Apache-2.0
"""The same run by the Triton kernels and by torch's operators, on a GPU or in the interpreter.

    TRITON_INTERPRET=1 python -m tests.kernels.gpu.runs --cases 200 --seed 0

Without the variable it needs a GPU. The exit code is 1 where the two paths part.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist import flora as flora_module
from flora_dist.core.step.batch import Batch, Phases
from flora_dist.core.step.gradient import Gradient
from flora_dist.core.step.matrix import MatrixPhases
from flora_dist.core.step.vector import VectorPhases
from flora_dist.kernels.gpu import inputs
from flora_dist.kernels.gpu.choice import make_phases
from flora_dist.kernels.gpu.cover import SMALLEST_BLOCK, why_not
from flora_dist.kernels.gpu.graph import CapturedStep, Record
from tests.kernels.paths import Case, case_of, judged, parted

STEPS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIXED = Case(
    seed=0,
    shapes=((20, 70), (30,)),
    dtype=torch.float32,
    settings={"lr": 1e-2, "momentum": "blend", "clip": 0.3, "weight_decay": 0.1, "kappa": 2},
)
# Windows of three steps: one that begins, one that records, one that replays.
GRAPHED = replace(
    FIXED,
    shapes=((9, 40), (9,)),
    dtype=torch.bfloat16,
    settings={**FIXED.settings, "kappa": 3},
)
GRAPH_STEPS = 6
# Places of ``Inputs._scalars``: what of a step goes wrong if one of them is.
SCALARS = {
    "beta2": 0,
    "rate of the second moment": 1,
    "lr": 2,
    "decay": 3,
    "beta1": 5,
    "share of the new": 6,
    "gain": 7,
    "clip": 8,
    "sign": 9,
    "scale of a sketch's entries": 10,
}


def with_rule(rule: str, **settings: object) -> Case:
    """``FIXED`` by another rule."""
    return replace(FIXED, settings={**FIXED.settings, "momentum": rule, **settings})


def unclipped(**settings: object) -> Case:
    """``FIXED`` without what bounds its updates."""
    return with_rule("blend", clip=None, **settings)


def small_case_of(seed: int) -> Case:
    """A random case that the interpreter runs in about a second; the same for a seed."""
    draw = random.Random(seed)
    shapes = tuple(_shape(draw) for _ in range(draw.randint(1, 2)))
    case = case_of(seed)
    return replace(case, shapes=shapes, settings=covered(case.settings))


def covered(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with what the kernels step: other blocks, and no tiles."""
    block = max(SMALLEST_BLOCK, settings["block"])
    return {**settings, "block": block, "orthogonalise": None}


def _shape(draw: random.Random) -> tuple[int, ...]:
    kind = draw.choice(["matrix", "matrix", "tall", "experts", "vector"])
    rows, columns = draw.randint(1, 20), draw.randint(16, 100)
    if kind == "tall":
        return (draw.randint(33, 70), 64)
    if kind == "experts":
        return (draw.randint(1, 3), rows, 32)
    return (columns,) if kind == "vector" else (rows, columns)


def by_torch(batch: Batch, gradient: Gradient) -> Phases:
    """Every batch by torch's operators."""
    del gradient
    return VectorPhases(batch) if batch.geometry.is_vector else MatrixPhases(batch)


def by_kernels(batch: Batch, gradient: Gradient) -> Phases:
    """Kernels for every batch, on any device."""
    assert not why_not(batch, gradient)
    return make_phases(batch, gradient)


def where_covered(batch: Batch, gradient: Gradient) -> Phases:
    """Kernels wherever they cover a batch."""
    return by_torch(batch, gradient) if why_not(batch, gradient) else make_phases(batch, gradient)


@contextmanager
def stepped(phases_of: Callable[[Batch, Gradient], Phases]) -> Iterator[None]:
    """Optimizers made inside step so."""
    with mock.patch.object(flora_module, "phases_of", phases_of):
        yield


def run(
    case: Case, phases_of: Callable[[Batch, Gradient], Phases]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, and the state's tensors among the latter."""
    draw = torch.Generator().manual_seed(case.seed)
    weights = {
        f"p{index}": nn.Parameter(
            (0.02 * torch.randn(shape, generator=draw)).to(device=DEVICE, dtype=case.dtype)
        )
        for index, shape in enumerate(case.shapes)
    }
    start = {key: weight.detach().clone() for key, weight in weights.items()}
    with stepped(phases_of):
        optimizer = Flora(weights.items(), **case.settings)
        for _ in range(STEPS):
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=draw).to(weight)
            optimizer.step()
    found = {key: weight.detach() for key, weight in weights.items()}
    for key, weight in weights.items():
        own = optimizer.state[weight]
        found |= {f"{key}.{k}": v for k, v in own.items() if isinstance(v, Tensor)}
    return start, found


def difference(case: Case) -> str:
    """What the two paths part in; empty where they agree."""
    start, expected = run(case, by_torch)
    found = run(case, by_kernels)[1]
    return judged(case, start, expected, found, lambda exact: run(exact, by_torch)[1])


def unnoticed() -> list[str]:
    """Scalars of a step that may be wrong by a hundredth without a difference."""
    start, expected = run(FIXED, by_torch)
    right: Any = inputs.Inputs._scalars
    missed = []
    for name, place in SCALARS.items():

        def wrong(self: inputs.Inputs, now: Any, place: int = place) -> list[float]:
            numbers = right(self, now)
            numbers[place] *= 0.99
            return list(numbers)

        with mock.patch.object(inputs.Inputs, "_scalars", wrong):
            found = run(FIXED, by_kernels)[1]
        if not parted(FIXED, start, expected, found):
            missed.append(name)
    return missed


def by_graph(case: Case, record: Record) -> str:
    """What a run parts in, in any bit, whose steps are recorded and replayed; empty if nothing."""
    weights: dict[str, list[nn.Parameter]] = {}
    for way in ("eager", "recorded"):
        draw = torch.Generator().manual_seed(case.seed)
        own = weights[way] = [
            nn.Parameter(torch.randn(shape, generator=draw).to(device=DEVICE, dtype=case.dtype))
            for shape in case.shapes
        ]
        for weight in own:
            weight.grad = torch.zeros_like(weight)
        with stepped(by_kernels):
            optimizer = Flora([(f"p{i}", w) for i, w in enumerate(own)], **case.settings)
            captured = CapturedStep(optimizer, record)
            step = captured.step if way == "recorded" else optimizer.step
            for count in range(GRAPH_STEPS):
                optimizer.param_groups[0]["lr"] = 1e-2 / (1 + count)
                for weight in own:
                    assert weight.grad is not None
                    weight.grad.copy_(torch.randn(weight.shape, generator=draw))
                step()
        assert all(state["step"] == GRAPH_STEPS for state in optimizer.state.values())
    pairs = zip(weights["eager"], weights["recorded"], strict=True)
    return ", ".join(f"p{i}" for i, (a, b) in enumerate(pairs) if not torch.equal(a, b))


def again(launch: Callable[[], None]) -> Callable[[], None]:
    """In place of a graph where there is no GPU: the same launches, by the same stale objects."""
    return launch


def synchronisations() -> list[str]:
    """What waits for the device in steps whose state, kernels and sketches are there."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 128, device=DEVICE))
    bias = nn.Parameter(torch.randn(64, device=DEVICE))
    lr = torch.tensor(1e-3, device=DEVICE)
    with stepped(by_kernels):
        optimizer = Flora([("w", weight), ("b", bias)], lr=lr)
    for parameter in (weight, bias):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        return [f"a step waits for the device: {error}"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


def main() -> int:
    """Print each case that parts; the exit code is 1 if any does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    cases = range(parsed.seed, parsed.seed + parsed.cases)
    broken = 0
    for seed in cases:
        case = small_case_of(seed)
        if what := difference(case):
            broken += 1
            print(f"seed {seed}: {what}; {case}")
    print(f"{parsed.cases} cases on {DEVICE}, {broken} broken")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
