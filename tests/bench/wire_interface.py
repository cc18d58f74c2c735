# SPDX-License-Identifier: Apache-2.0
"""Bytes that leave a host: what gloo costs per payload, and training steps beside that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tests.bench.hosts import bytes_sent, pool_on
from tests.bench.wire_counter import Collectives, Payload
from tests.bench.wire_counts import LLAMA_9M, WARM_UP
from tests.bench.wire_setups import Setup, start
from tests.cluster.hosts import hosts
from tests.harness.launched import LaunchedPool

SETTLE_SECONDS = 0.3
"""Until the last acknowledgements have left."""
STEPS = 3
LAYOUTS = ("ddp", "fsdp2", "hsdp", "zero-1", "zero-2", "zero-3")
BYTES = (40, 4_000, 40_000, 400_000, 4_000_000, 40_000_000)


def _all_reduce(whole: Tensor, share: Tensor) -> None:
    del share
    dist.all_reduce(whole)


def _reduce_scatter(whole: Tensor, share: Tensor) -> None:
    dist.reduce_scatter_single(share, whole)


def _all_gather(whole: Tensor, share: Tensor) -> None:
    dist.all_gather_single(whole, share)


COLLECTIVES = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One rank's share of a measurement."""

    payloads: list[Payload]
    bytes: int
    """By all interfaces of its host; 0 on other ranks of the same host."""
    steps: int


def measured(call: Callable[[], object], *, per_host: int) -> int:
    """Bytes that this rank's host sends in ``call``."""
    dist.barrier()
    time.sleep(SETTLE_SECONDS)
    before = bytes_sent("eth0", "lo")
    call()
    time.sleep(SETTLE_SECONDS)
    sent = bytes_sent("eth0", "lo") - before
    dist.barrier()
    return sent if dist.get_rank() % per_host == 0 else 0


# ---- one collective


def cost_of_collectives(per_host: int) -> dict[tuple[str, int], int]:
    """Bytes that this host sends, by collective and bytes of the whole buffer."""
    found = {}
    ranks = dist.get_world_size()
    for name, collective in COLLECTIVES.items():
        for size in BYTES:
            share = torch.ones(size // 4 // ranks)
            whole = torch.ones(len(share) * ranks)
            call = partial(collective, whole, share)
            call()  # connects
            found[name, size] = measured(call, per_host=per_host)
    return found


def print_backend(only: str) -> None:
    """What each rank sends, over the bytes of the whole buffer."""
    del only
    print(
        "Bytes that gloo sends from each rank, frames included, over the bytes of the whole\n"
        "buffer: all ranks of two hosts together, by the counters of their interfaces."
    )
    print(f"{'ranks':>5} {'collective':16} " + " ".join(f"{size:>10,}" for size in BYTES))
    for per_host in (1, 2):
        with hosts(2) as pair:
            pool = pool_on(pair, per_host=per_host)
            try:
                everyone = pool(cost_of_collectives, per_host)
            finally:
                pool.close()
        for name in COLLECTIVES:
            shares = [
                sum(found[name, size] for found in everyone) / len(everyone) / size
                for size in BYTES
            ]
            cells = " ".join(f"{share:10.3f}" for share in shares)
            print(f"{len(everyone):5} {name:16} {cells}", flush=True)


# ---- steps


def sent_in_steps(setup: Setup, per_host: int) -> Sent:
    """What this rank gives to collectives, and what its host sends, in some steps."""
    training = start(setup)
    collectives = Collectives()
    training.run(range(WARM_UP))

    def steps() -> None:
        with collectives:
            training.run(range(WARM_UP, WARM_UP + STEPS))

    return Sent(payloads=collectives.sent, bytes=measured(steps, per_host=per_host), steps=STEPS)


def print_interface(only: str) -> None:
    """Measured bytes beside what gloo's cost of the counted payloads predicts."""
    print(
        "Bytes per rank and step that leave by the interfaces of two hosts, everything (weights,\n"
        "messages, frames) included, beside what gloo's cost of the counted payload predicts.\n"
        f"llama-9m, 4 micro-batches, mean of {STEPS} steps."
    )
    print(
        f"{'layout and level':30} {'payload':>13} {'predicted':>13} {'measured':>13} {'ratio':>7}"
    )
    base = Setup(layout="", model=LLAMA_9M, micro_batches=4)
    for per_host, layouts in ((1, [n for n in LAYOUTS if n != "hsdp"]), (2, ["hsdp"])):
        chosen = [layout for layout in layouts if layout.startswith(only)]
        if not chosen:
            continue
        with hosts(2) as pair:
            pool = pool_on(pair, per_host=per_host)
            try:
                for layout in chosen:
                    for ratio, wire in ((None, "float32"), (16, "float32"), (16, "bfloat16")):
                        setup = replace(base, layout=layout, ratio=ratio, wire_dtype=wire)
                        _print_row(setup, pool, per_host)
            finally:
                pool.close()


def _print_row(setup: Setup, pool: LaunchedPool, per_host: int) -> None:
    everyone = pool(sent_in_steps, setup, per_host)
    scale = 1 / len(everyone) / everyone[0].steps
    payload = scale * sum(p.bytes for sent in everyone for p in sent.payloads)
    predicted = scale * sum(p.cost for sent in everyone for p in sent.payloads)
    measured_bytes = scale * sum(sent.bytes for sent in everyone)
    print(
        f"{setup!s:30} {payload:13,.0f} {predicted:13,.0f} {measured_bytes:13,.0f} "
        f"{measured_bytes / predicted:7.4f}",
        flush=True,
    )
