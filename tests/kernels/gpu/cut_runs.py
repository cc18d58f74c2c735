# SPDX-License-Identifier: Apache-2.0
"""Parameters of which other ranks hold pieces, stepped by Triton kernels and by torch's operators.

    TRITON_INTERPRET=1 python -m tests.kernels.gpu.cut_runs --cases 100 --seed 0

Spans as of ZeRO and FSDP1, and shards of columns; what other ranks would send follows from what
this one does, for both ways.
The exit code is 1 where they part.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.core.layouts.flat import FlatLayout, cut_line
from flora_dist.core.step.batch import Batch, Phases
from flora_dist.core.step.gradient import Gradient
from flora_dist.kernels.gpu.choice import make_phases
from flora_dist.kernels.gpu.cover import why_not
from flora_dist.kernels.gpu.trial_layouts import ColumnsLayout, ColumnsPart, Echo
from tests.kernels.gpu import runs
from tests.kernels.paths import Case, case_of, judged

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class CutCase:
    """One run: which rank of how many, and how parameters are cut."""

    case: Case
    ranks: int
    rank: int
    by_columns: bool


# The middle one of three spans begins and ends inside of rows and blocks, and of experts; the first
# of two shards of columns ends so. The rule reads every term, and clips by them.
SPANNED = CutCase(
    case=replace(
        runs.with_rule("flora", clip=0.01, block=16, rank=4, scale_parameter=True),
        shapes=((9, 40), (3, 4, 32)),
    ),
    ranks=3,
    rank=1,
    by_columns=False,
)
SHARDED = replace(
    SPANNED, case=replace(SPANNED.case, shapes=((20, 90),)), ranks=2, rank=0, by_columns=True
)


def with_rule(cut: CutCase, rule: str, **more: object) -> CutCase:
    """The same by another rule."""
    settings = {**cut.case.settings, "momentum": rule, **more}
    return replace(cut, case=replace(cut.case, settings=settings))


def cut_case_of(seed: int) -> CutCase:
    """A random case; the same for a seed."""
    draw = random.Random(seed)
    ranks, by_columns = draw.randint(2, 3), draw.random() < 0.5
    block = draw.choice([16, 16, 32])
    settings = runs.covered(case_of(seed).settings)
    settings |= {"block": block, "rank": draw.choice([None, 2, 4])}
    settings |= {"state_dtype": draw.choice(["float32", "float32", "bfloat16"])}
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    shapes: tuple[tuple[int, ...], ...] = ((draw.randint(2, 40), draw.randint(48, 100)),)
    if not by_columns:
        more = [(7, 40), (2, draw.randint(2, 5), 32), (20,)]
        shapes = (*shapes, *draw.sample(more, draw.randint(0, 2)))
    return CutCase(
        case=Case(seed=seed, shapes=shapes, dtype=dtype, settings=settings),
        ranks=ranks,
        rank=draw.randint(0, ranks - 1),
        by_columns=by_columns,
    )


def run(
    cut: CutCase, phases_of: Callable[[Batch, Gradient], Phases]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, and the state's tensors among the latter."""
    draw = torch.Generator().manual_seed(cut.case.seed)
    with runs.stepped(phases_of):
        weight, optimizer = (_shard if cut.by_columns else _span)(cut, draw)
        start = weight.detach().clone()
        for _ in range(STEPS):
            weight.grad = torch.randn(weight.shape, generator=draw).to(weight)
            optimizer.step()
    found = {"w": weight.detach()}
    for name, own in optimizer.state[weight].items():
        if isinstance(own, Tensor):
            found[f"w.{name}"] = own
        elif isinstance(own, dict):
            found |= {f"{name}.{k}": v for k, v in own.items() if isinstance(v, Tensor)}
    return {"w": start}, {name: own for name, own in found.items() if own.numel()}


def _span(cut: CutCase, draw: torch.Generator) -> tuple[nn.Parameter, Flora]:
    shapes = [(f"p{index}", shape) for index, shape in enumerate(cut.case.shapes)]
    ends = list(itertools.accumulate(torch.Size(shape).numel() for _, shape in shapes))
    size = -(-ends[-1] // cut.ranks)
    spans = cut_line(
        shapes, offsets=[0, *ends[:-1]], size=size, rank=cut.rank, world_size=cut.ranks
    )
    flat = _weight((size,), cut, draw)
    layout = FlatLayout()
    layout.add(flat, spans, rank=cut.rank, reducer=Echo(cut.rank))
    optimizer = Flora([flat], **cut.case.settings)
    optimizer.attach_layout(layout, [[flat]])
    return flat, optimizer


def _shard(cut: CutCase, draw: torch.Generator) -> tuple[nn.Parameter, Flora]:
    ((rows, columns),) = cut.case.shapes
    each = -(-columns // cut.ranks)
    owned = tuple((rank * each, min(columns, (rank + 1) * each)) for rank in range(cut.ranks))
    first, last = owned[cut.rank]
    weight = _weight((rows, last - first), cut, draw)
    part = ColumnsPart(weight, "w", (rows, columns), owned, Echo(cut.rank))
    optimizer = Flora([("w", weight)], **cut.case.settings)
    optimizer.attach_layout(ColumnsLayout([part]), [[weight]])
    return weight, optimizer


def _weight(shape: tuple[int, ...], cut: CutCase, draw: torch.Generator) -> nn.Parameter:
    start = 0.02 * torch.randn(shape, generator=draw)
    return nn.Parameter(start.to(device=runs.DEVICE, dtype=cut.case.dtype))


def by_kernels(batch: Batch, gradient: Gradient) -> Phases:
    """Kernels, which must cover the batch."""
    assert not why_not(batch, gradient)
    return make_phases(batch, gradient)


def difference(cut: CutCase) -> str:
    """What the two paths part in; empty where they agree."""
    start, expected = run(cut, runs.by_torch)
    found = run(cut, by_kernels)[1]

    def by_torch(case: Case) -> dict[str, Tensor]:
        return run(replace(cut, case=case), runs.by_torch)[1]

    return judged(cut.case, start, expected, found, by_torch)


def wrong_cuts(seeds: Iterable[int]) -> list[str]:
    """Which random runs part; empty if none does."""
    cuts = [cut_case_of(seed) for seed in seeds]
    return [f"{what}; {cut}" for cut in cuts if (what := difference(cut))]


def main() -> int:
    """Print each run that parts; the exit code is 1 if any does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    wrong = wrong_cuts(range(parsed.seed, parsed.seed + parsed.cases))
    print("\n".join([*wrong, f"{parsed.cases} cases on {runs.DEVICE}, {len(wrong)} broken"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
