# SPDX-License-Identifier: Apache-2.0
"""Train the zoo with sketched gradients on every layout."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import flora_dist
from flora_dist import Flora
from tests.battery import zoo
from tests.battery.oracle import STEPS
from tests.battery.wrapped import ALIGNED, CUT, Layout, full_weights
from tests.battery.wrapped import LAYOUTS as LAYOUTS_OF_TORCH
from tests.gradients.faults import broken
from tests.gradients.oracle import SketchedCase, Weights


def train(layout: Layout, case: SketchedCase) -> tuple[Weights, list[float]]:
    model = zoo.build(case.dtype)
    wrapped = layout.wrap(model)
    optimizer = Flora(wrapped.named_parameters(), **case.flora)
    handle = flora_dist.attach(
        wrapped,
        optimizer,
        case.level,
        gradient_rank=case.gradient_rank,
        gradient_bits=case.gradient_bits,
        wire_bits=case.wire_bits,
        wire_dtype=case.wire_dtype,
        bucket_cap_mb=case.bucket_cap_mb,
    )
    norms = []
    for step in range(STEPS):
        tokens = layout.share(zoo.batch(step, case.samples))
        accumulate(wrapped, tokens, case.micro_batches, case.bucket_cap_mb)
        assert handle.gradients._is_under_way == case.is_cut
        if case.max_norm is None:
            norms.append(float(optimizer.grad_norm()))
        else:
            norms.append(float(optimizer.clip_grad_norm_(case.max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return full_weights(model), norms


def accumulate(
    wrapped: nn.Module, tokens: Tensor, micro_batches: int, cap: float | None = None
) -> None:
    """Every micro-batch but the last without FSDP2's own reductions, DDP always with its own.

    Under a cap on buckets DDP has its own in the last one alone, too.
    """
    for number, part in enumerate(tokens.chunk(micro_batches), start=1):
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(number == micro_batches)
        elif isinstance(wrapped, DistributedDataParallel) and cap is not None:
            wrapped.require_backward_grad_sync = number == micro_batches
        (wrapped(part) / micro_batches).backward()


LAYOUTS = {
    name: (layout.ranks, partial(train, layout))
    for name, layout in LAYOUTS_OF_TORCH.items()
    if not name.startswith("fsdp1") and name not in {"columns x3", ALIGNED, CUT}
}
"""Name -> (ranks, how to train the zoo there)."""


def run(layout: str, case: SketchedCase, fault: str = "") -> tuple[Weights, list[float]]:
    """One rank's share of a run; ``fault`` breaks one mechanism first."""
    with broken(fault):
        return train(LAYOUTS_OF_TORCH[layout], case)
