# SPDX-License-Identifier: Apache-2.0
"""Time per training step of two hosts on a slow link, all rows in one run.

One process and one thread per host. The link is a veth pair with a token bucket at both ends, so
that its bandwidth is exact to some percent while the processors may be shared with others: read the
ratios. Plain rows have their best: DDP overlaps its buckets with backward and both it and FSDP2
reduce the last of the micro-batches alone; ZeRO-2 has no such choice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.distributed as dist

from tests.bench.hosts import pool_on
from tests.bench.wire_counter import Collectives
from tests.bench.wire_counts import expected
from tests.bench.wire_interface import measured
from tests.bench.wire_setups import Setup, start
from tests.cluster.hosts import Host, hosts

MBIT = 200
MODEL = ("llama_60m", (("tokens", 8), ("num_hidden_layers", 4), ("vocab_size", 2048)))
"""Layers of llama-60m with few words: 14.7 million parameters, 59 MB of gradients in fp32."""
WARM_UP = 2
"""DDP builds its buckets anew after the first step; PowerSGD starts in the third."""
STEPS = 5
RATIO = 16
CAP = 1.0
"""MiB of a bucket in 4 bits: eight messages each way."""


class Row(NamedTuple):
    """A setup, but for what all have in common."""

    layout: str
    ratio: int | None = None
    wire_dtype: str = "float32"
    bits: int | None = None
    wire_bits: int | None = None
    """1 bit is for what is sent: four micro-batches summed in 1 bit would be noise."""
    bucket_cap_mb: float | None = None


ROWS: dict[str, tuple[Row, ...]] = {
    "ddp": (
        Row("ddp"),
        Row("ddp, PowerSGD", ratio=RATIO),
        Row("ddp, flora_hook", ratio=RATIO),
        Row("ddp", ratio=RATIO),
        Row("ddp", ratio=RATIO, wire_dtype="bfloat16"),
        Row("ddp", bits=4),
        Row("ddp", bits=4, bucket_cap_mb=CAP),
        Row("ddp", bits=4, wire_bits=1),
        Row("ddp", bits=4, wire_bits=1, bucket_cap_mb=CAP / 4),
    ),
    "zero-2": (
        Row("zero-2"),
        Row("zero-2", ratio=RATIO),
        Row("zero-2", bits=4),
        Row("zero-2", bits=4, bucket_cap_mb=CAP),
        Row("zero-2", bits=4, wire_bits=1),
    ),
    "fsdp2": (
        Row("fsdp2"),
        Row("fsdp2", ratio=RATIO),
        Row("fsdp2", bits=4),
        Row("fsdp2", bits=4, bucket_cap_mb=CAP),
        Row("fsdp2", bits=4, wire_bits=1),
    ),
}
"""By whom a row is compared with, the first of its kind."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One rank's steps."""

    seconds: list[float]
    processor: list[float]
    """Seconds of this rank's process, in each."""
    cost: float
    """Bytes per step that gloo's cost of the counted payload predicts."""
    sent: float
    """Bytes per step that have left the host."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def timed(setup: Setup) -> Timed:
    """Whole steps, ranks beginning each together."""
    training = start(setup)
    training.run(range(WARM_UP))
    collectives, seconds, processor = Collectives(), [], []

    def steps() -> None:
        for step in range(WARM_UP, WARM_UP + STEPS):
            dist.barrier()
            begin, used = time.perf_counter(), time.process_time()
            with collectives:
                training.run(range(step, step + 1))
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - used)

    sent = measured(steps, per_host=1) / STEPS
    cost = sum(payload.cost for payload in collectives.sent) / STEPS
    return Timed(seconds=seconds, processor=processor, cost=cost, sent=sent)


def print_link(only: str) -> None:
    """One row per setup."""
    base = Setup(layout="", model=MODEL, micro_batches=4)
    sizes = expected(base.geometries())
    print(
        f"Seconds per step, {MBIT} Mbit/s each way between two hosts, {base.micro_batches} "
        f"micro-batches of 8 tokens,\n{sizes.compressed + sizes.dense:,} parameters, fp32; median "
        f"of {STEPS} steps after {WARM_UP}.\n"
        "faster: than the first row of its kind; by bytes: its counted bytes over this row's;\n"
        "by link: if the link's time for the bytes saved were all that changes. counted: what\n"
        "gloo's cost of the counted payload says that a rank sends; sent: what its host has sent,\n"
        "and how long the link takes for that. cpu: seconds of a rank's process, all its threads."
    )
    print(
        f"{'layout and level':36} {'median':>7} {'min':>6} {'max':>6} {'faster':>7} {'by bytes':>9}"
        f" {'by link':>8} {'counted MB':>11} {'sent MB':>8} {'link s':>6} {'cpu s':>6}"
    )
    for kind, rows in ROWS.items():
        if kind.startswith(only):
            with hosts(2, mbit=MBIT) as pair:
                _print_rows(base, rows, pair)


def _print_rows(base: Setup, rows: Sequence[Row], pair: Sequence[Host]) -> None:
    pool = pool_on(pair)
    first: Timed | None = None
    try:
        for row in rows:
            setup = replace(base, **row._asdict())
            # Ranks begin a step together and wait for each other in it: any of them will do.
            found = pool(timed, setup, timeout=400.0)[0]
            first = first or found
            print(f"{setup!s:36} {_cells(first, found)}", flush=True)
    finally:
        pool.close()


def _cells(first: Timed, found: Timed) -> str:
    by_link = first.median / (first.median - _link_seconds(first.cost - found.cost))
    counted = f"{first.cost / found.cost:9.2f} {by_link:8.2f} {found.cost / 1e6:11.2f}"
    if found.sent > 2 * found.cost:  # PowerSGD's callbacks send from threads that nobody counts
        counted = f"{'-':>9} {'-':>8} {'-':>11}"
    return (
        f"{found.median:7.2f} {min(found.seconds):6.2f} {max(found.seconds):6.2f} "
        f"{first.median / found.median:7.2f} {counted} {found.sent / 1e6:8.2f} "
        f"{_link_seconds(found.sent):6.2f} {statistics.median(found.processor):6.2f}"
    )


def _link_seconds(num_bytes: float) -> float:
    return 8 * num_bytes / (MBIT * 1e6)
