# SPDX-License-Identifier: Apache-2.0
"""Peak bytes of gradients and accumulators under FSDP2, four micro-batches, one reduction.

Counted: every storage that an operator of backward or of the reduction makes or fills, while it is
alive: gradients of weights, sums of them that FSDP2 keeps, its buffers, accumulators, buckets, what
arrives. Not counted: what was alive before the first micro-batch (weights, also while gathered;
optimizer state), and what forward makes (activations; inputs are so few that those backward touches
are little, and they are counted). Weights stay gathered from forward to backward, or gathering them
would be among the operators of backward.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tests.bench.memory import LiveBytes
from tests.bench.wire_counts import LLAMA_9M, LLAMA_60M, expected
from tests.bench.wire_setups import Setup, Training, start
from tests.conftest import launched_pool_of

WARM_UP = 1
"""Steps before: afterwards the optimizer's state is there."""
DEEP = ("stack", (("layers", 32), ("width", 512), ("inner", 512)))
MODELS = {"llama-9m": LLAMA_9M, "llama-60m": LLAMA_60M, "32 equal layers of 512": DEEP}
ALLOWED = 1.3


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes on one rank."""

    gradients: int
    """Until the gradients are reduced."""
    largest_unit: int
    """The gradient of the largest unit that FSDP2 shards, whole."""


def peak(setup: Setup) -> Peak:
    """Of one step of this rank."""
    training, live = _until_reduced(setup)
    return Peak(gradients=live.peak, largest_unit=max(_units(training.model)))


def peak_with_step(setup: Setup) -> int:
    """Until the end of the step, whose own temporaries are counted with the gradients."""
    training, live = _until_reduced(setup)
    with live:
        training.step()
    return live.peak


def _until_reduced(setup: Setup) -> tuple[Training, LiveBytes]:
    training = start(setup)
    training.run(range(WARM_UP))
    live = LiveBytes(known=_alive())
    training.accumulate(WARM_UP, lambda: live)
    with live:
        training.reduce()
    return training, live


def bound(setup: Setup, found: Peak) -> float:
    """What the peak of gradients may be: 1.3 times sketches and the largest unit's gradient."""
    assert setup.ratio is not None
    full = 4 * expected(setup.geometries()).compressed
    return ALLOWED * (full / setup.ratio + found.largest_unit)


def _alive() -> Iterator[Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            yield thing


def _units(model: nn.Module) -> Iterator[int]:
    """Bytes of the whole gradient of each unit; a parameter belongs to the innermost."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    taken: set[int] = set()
    for unit in reversed(units):  # inner ones come later
        own = [p for p in unit.parameters() if id(p) not in taken]
        taken.update(map(id, own))
        yield sum(p.numel() * p.itemsize for p in own)


def print_memory(only: str) -> None:
    """One row per model and level."""
    del only
    print("FSDP2 on 2 ranks, 4 micro-batches, the first three not synchronised; fp32. MB = 10^6.")
    print("gradients: their peak until they are reduced, accumulators and buffers among them;")
    print(f"allowed: {ALLOWED} x (full / ratio + the largest unit's gradient); with step: till its")
    print("end, its own temporaries counted too")
    print(
        f"{'model':24} {'level':16} {'full MB':>8} {'unit MB':>8} {'gradients':>10} "
        f"{'allowed':>8} {'with step':>10}"
    )
    pool = launched_pool_of(2)
    try:
        for name, model in MODELS.items():
            base = Setup(layout="fsdp2, weights kept", model=model, micro_batches=4)
            for ratio in (None, 8, 16):
                setup = replace(base, ratio=ratio)
                found = max(pool(peak, setup), key=lambda rank: rank.gradients)
                with_step = max(pool(peak_with_step, setup))
                sizes = expected(setup.geometries())
                full = 4 * (sizes.compressed + sizes.dense)
                level = "dense" if ratio is None else f"1/{ratio}"
                allowed = "" if ratio is None else f"{bound(setup, found) / 1e6:.1f}"
                print(
                    f"{name:24} {level:16} {full / 1e6:8.1f} {found.largest_unit / 1e6:8.1f} "
                    f"{found.gradients / 1e6:10.1f} {allowed:>8} {with_step / 1e6:10.1f}",
                    flush=True,
                )
    finally:
        pool.close()
