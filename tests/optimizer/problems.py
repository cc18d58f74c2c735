# SPDX-License-Identifier: Apache-2.0
"""Five problems whose least loss is known, and how near a rule comes to it in 150 steps.

    python -m tests.optimizer.problems

prints the table of all rules. Losses are divided by what they lose at the start, where the weights
are zero, so that a row begins at 1 and 0 is perfect. Gradients are those of all data: what a rule
leaves over is its own doing. lr follows half a cosine down to nothing.

All nine learning rates of a problem are trained side by side, as parameters of one optimizer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flora_dist import Flora
from flora_dist.core.state.presets import RACS, SCALE

STEPS = 150
RATES = tuple(10 ** (quarter / 4) for quarter in range(-6, 3))
"""Learning rates, 0.03 to 3.2."""
ENOUGH = 1e-6
"""Of the excess loss at the start."""
COLUMNS = 64
"""Of every matrix: one block of the default settings."""
EXAMPLES = 256

Make = Callable[[list[dict[str, object]]], torch.optim.Optimizer]
Losses = Mapping[str, Sequence[float]]
"""By problem: the excess that is left at each of ``RATES``; infinite where a run diverged."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A loss of one matrix, in float64."""

    shape: tuple[int, ...]
    loss: Callable[[Tensor], Tensor]
    least: float

    def excess(self, weight: Tensor) -> Tensor:
        """What the loss is above its least, over what it is at zero."""
        start = self.loss(torch.zeros(self.shape, dtype=torch.float64)) - self.least
        return (self.loss(weight.double()) - self.least) / start


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def quadratic() -> Problem:
    """Every element has a curvature of its own, from 1 to 30."""
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    curvature = torch.logspace(0, math.log10(30), COLUMNS, dtype=torch.float64)[order]
    target = _normal(16, COLUMNS, seed=2)
    return Problem(
        shape=(16, COLUMNS),
        loss=lambda w: (curvature * (w - target).square()).mean(),
        least=0.0,
    )


def regression(*shape: int) -> Problem:
    """Least squares over normal inputs, with noise in what is to be met."""
    inputs = _normal(EXAMPLES, COLUMNS, seed=3)
    noise = 0.1 * _normal(*shape[:-2], EXAMPLES, shape[-2], seed=5)
    wanted = inputs @ _normal(*shape, seed=4).mT + noise
    best = torch.linalg.lstsq(inputs.expand(*wanted.shape[:-2], -1, -1), wanted).solution.mT

    def loss(w: Tensor) -> Tensor:
        return (inputs @ w.mT - wanted).square().mean()

    return Problem(shape=shape, loss=loss, least=loss(best).item())


def logistic() -> Problem:
    """Eight classes at random, with a penalty; the least loss is Newton's."""
    classes = 8
    inputs = 0.3 * _normal(EXAMPLES, COLUMNS, seed=7)  # so that weights are of size 1 here too
    labels = torch.randint(classes, (EXAMPLES,), generator=torch.Generator().manual_seed(8))

    def loss(w: Tensor) -> Tensor:
        return cross_entropy(inputs @ w.T, labels) + 0.0005 * w.square().sum()

    best = torch.zeros(classes, COLUMNS, dtype=torch.float64)
    for _ in range(8):
        slope = torch.autograd.functional.jacobian(loss, best).flatten()
        curvature = torch.autograd.functional.hessian(loss, best).reshape(slope.numel(), -1)
        best = best - torch.linalg.solve(curvature, slope).view_as(best)
    return Problem(shape=(classes, COLUMNS), loss=loss, least=loss(best).item())


def problems() -> dict[str, Problem]:
    """All five, by name."""
    return {
        "quadratic": quadratic(),
        "regression": regression(16, COLUMNS),
        "logistic": logistic(),
        "experts": regression(3, 8, COLUMNS),
        "one row": regression(1, COLUMNS),
    }


def losses(make: Make, rates: Sequence[float] = RATES) -> Losses:
    """What is left of each problem at each learning rate; ``make`` builds from named groups."""
    given = problems()
    weights = {(p, lr): nn.Parameter(torch.zeros(given[p].shape)) for p in given for lr in rates}
    groups: list[dict[str, object]] = [
        {"params": [(f"{p} {lr:.3f}", weights[p, lr]) for p in given], "lr": lr} for lr in rates
    ]
    optimizer = make(groups)
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.zero_grad()
        torch.stack(
            [given[p].excess(weight) for (p, _), weight in weights.items()]
        ).sum().backward()
        for weight in weights.values():  # what has diverged stays so, and must not end the run
            if weight.grad is not None:
                weight.grad.nan_to_num_(nan=0.0, posinf=1e18, neginf=-1e18).clamp_(-1e18, 1e18)
        optimizer.step()
    with torch.no_grad():
        return {
            p: [_finite(given[p].excess(weights[p, lr].detach()).item()) for lr in rates]
            for p in given
        }


def _finite(excess: float) -> float:
    return excess if math.isfinite(excess) else math.inf


def widest_range(left: Sequence[float]) -> float:
    """Largest over smallest of ``RATES`` in a row that leave no more than ``ENOUGH``."""
    best, start = 0.0, None
    for index, excess in enumerate(left):
        if excess > ENOUGH:
            start = None
            continue
        start = index if start is None else start
        best = max(best, RATES[index] / RATES[start])
    return best


def flora(**settings: object) -> Make:
    """Makes Flora with these settings."""
    return lambda groups: Flora(groups, **settings)  # type: ignore[arg-type]


def rules() -> Iterator[tuple[str, Make]]:
    """Rows of the printed table."""
    yield "AdamW", lambda groups: torch.optim.AdamW(groups, weight_decay=0.0)
    yield "default", flora()
    yield "dense momentum", flora(rank=None)
    yield "dense, 8 bits", flora(rank=COLUMNS, block=COLUMNS, state_bits=8)
    yield "none", flora(momentum="none")
    yield "ademamix", flora(momentum="ademamix")
    yield "subspace_adam", flora(momentum="subspace_adam")
    yield "apollo", flora(momentum="apollo")
    yield "growth 1.01", flora(growth=1.01)
    yield "SCALE", flora(**SCALE)
    yield "RACS", flora(**RACS)
    yield "orthogonal tiles", flora(orthogonalise=COLUMNS)
    for gain in (1.0, 1.5, 2.0):
        yield f"blend, rank 8, gain {gain:g}", flora(rank=8, blend_gain=gain)
    yield "flora", flora(momentum="flora", rank=8)
    yield "flora_strict", flora(momentum="flora_strict", rank=8)


def main() -> int:
    """Print the table."""
    shown = sys.stdout
    shown.write(f"{'rule':24s} {'problem':12s} least left   lr range with <= {ENOUGH:g}\n")
    for rule, make in rules():
        for problem, left in losses(make).items():
            shown.write(f"{rule:24s} {problem:12s} {min(left):10.1e}   {widest_range(left):.0f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
