# SPDX-License-Identifier: Apache-2.0
"""Times of kernels on a GPU, beside fused AdamW and a copy of the same memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flora_dist import Flora
from flora_dist.core.records import Code
from flora_dist.kernels.gpu.graph import CapturedStep, record_graph
from flora_dist.kernels.gpu.recorded import add_by_torch_, add_records_by_triton_
from flora_dist.kernels.gpu.sketches import add_sketch_
from tests.kernels.gpu.runs import DEVICE, again, by_torch, stepped, where_covered

Shapes = Sequence[tuple[int, ...]]
# A decoder of 22 layers of 2048 columns and an embedding of 32,000 rows: 1.1 billion elements.
LAYER: Shapes = [(2048, 2048)] * 4 + [(5632, 2048)] * 2 + [(2048, 5632)]
SHAPES: Shapes = [*LAYER * 22, (32000, 2048), *[(2048,)] * 45]
TOY: Shapes = [(24, 64), (24, 64), (40,)]
RULES = ("blend", "none", "flora")
ROUNDS = 20
# Of weights and gradients that a step must read and write at rank 8 of 64, with fp32 momentum.
BYTES = {("AdamW", 4): 28, ("AdamW", 2): 14, ("blend", 4): 17, ("blend", 2): 9}


def milliseconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """Times of some calls, by the device's clock."""
    if DEVICE != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def copied(elements: int, rounds: int) -> float:
    """Gigabytes per second that a copy reads and writes."""
    source = torch.empty(elements, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    best = statistics.median(milliseconds(lambda: target.copy_(source), rounds))
    return 8 * elements / best / 1e6


def step(is_rehearsal: bool) -> dict[str, Any]:
    """``step()`` by kernels, recorded and by torch's operators, and AdamW's."""
    shapes, rounds = (TOY, 1) if is_rehearsal else (SHAPES, ROUNDS)
    found: dict[str, Any] = {"faults": [], "elements": sum(torch.Size(s).numel() for s in shapes)}
    found["copy GB/s"] = copied(1 << (10 if is_rehearsal else 28), rounds)
    for dtype in (torch.bfloat16, torch.float32):
        found[str(dtype)] = _steps(shapes, dtype, rounds)
    return found


def _steps(shapes: Shapes, dtype: torch.dtype, rounds: int) -> Mapping[str, Any]:
    torch.manual_seed(0)
    weights = [nn.Parameter((0.02 * torch.randn(s, device=DEVICE)).to(dtype)) for s in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    named = [(f"p{index}", weight) for index, weight in enumerate(weights)]
    rows: dict[str, Any] = {}
    for fused in (True, False):
        adamw = torch.optim.AdamW(weights, lr=1e-5, fused=fused, foreach=not fused)
        rows["AdamW, fused" if fused else "AdamW, foreach"] = _row(adamw.step, rounds)
        del adamw
    for rule in RULES:
        with stepped(where_covered):
            optimizer = Flora(named, lr=1e-5, momentum=rule)
        rows[f"Flora, {rule}"] = _row(optimizer.step, rounds)
        captured = CapturedStep(optimizer, record_graph if DEVICE == "cuda" else again)
        rows[f"Flora, {rule}, recorded"] = _row(captured.step, rounds)
        with stepped(by_torch):
            optimizer = Flora(named, lr=1e-5, momentum=rule)
        rows[f"Flora, {rule}, torch's operators"] = _row(optimizer.step, max(1, rounds // 4))
    base = rows["AdamW, fused"]["ms"]
    elements = sum(weight.numel() for weight in weights)
    size = weights[0].element_size()
    for name, row in rows.items():
        row["ratio"] = round(row["ms"] / base, 3)
        kind = "AdamW" if name.startswith("AdamW") else name.split(", ")[1]
        if (kind, size) in BYTES:
            row["GB/s"] = round(BYTES[kind, size] * elements / row["ms"] / 1e6, 1)
    return rows


def _row(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Two calls first: kernels are compiled, state is made, graphs are recorded."""
    call()
    call()
    start = time.perf_counter()
    call()
    host = 1e3 * (time.perf_counter() - start)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    times = milliseconds(call, rounds)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {
        "ms": round(statistics.median(times), 4),
        "least ms": round(min(times), 4),
        "most ms": round(max(times), 4),
        "host ms": round(host, 4),
        "extra bytes": float(peak - before),
    }


def sketch(is_rehearsal: bool) -> dict[str, Any]:
    """C += G A^T by the kernel and by a product of torch, and that both agree."""
    rows, columns, rounds = (40, 128, 1) if is_rehearsal else (8192, 8192, ROUNDS)
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device=DEVICE).to(torch.bfloat16)
    unit = torch.randn(8, 64, device=DEVICE).sign()
    scale = 8**-0.5
    out = torch.zeros(rows, columns // 64, 8, device=DEVICE)
    blocks = x.view(rows * columns // 64, 64)

    def by_product() -> torch.Tensor:
        return out.view(-1, 8).addmm_(blocks.float(), scale * unit.T)

    expected = by_product().clone()
    out.zero_()
    add_sketch_(out, x, unit, scale=scale)
    distance = ((out.view(-1, 8) - expected).norm() / expected.norm()).item()
    faults = [] if distance < 1e-5 else [f"{distance:.1e} from torch's product"]
    return {
        "faults": faults,
        "distance": distance,
        "by the kernel": _row(lambda: add_sketch_(out, x, unit, scale=scale), rounds),
        "by torch": _row(by_product, rounds),
        **_records(x[:16, :64].contiguous() if is_rehearsal else x, rounds),
    }


def _records(x: torch.Tensor, rounds: int) -> dict[str, Any]:
    """C <- Q(C + G A^T) with all numbers of a block in 4 bits, by the kernel and by torch."""
    code, (rows, columns) = Code(bits=4, numbers=64), x.shape
    sketch_ERB = torch.randn(1, 64, 64, device=DEVICE).sign()
    made = torch.zeros(1, rows, columns // 64, code.bytes, dtype=torch.uint8, device=DEVICE)
    given = (code, ((0, rows),), (1, 0, columns))

    def by_kernel() -> None:
        add_records_by_triton_(made, x[None], sketch_ERB, 1.0, *given)

    return {
        "records by the kernel": _row(by_kernel, rounds),
        "records by torch": _row(
            lambda: add_by_torch_(made, x[None], sketch_ERB, *given), max(1, rounds // 4)
        ),
    }
