# SPDX-License-Identifier: Apache-2.0
"""Prints what a rank's step costs its host, by the number of ranks, with torch's ``fake`` group.

    python -m tests.bench.scale                        1 to 1,024 ranks, in markdown
    python -m tests.bench.scale --ranks 1,1024 --network experts

Rank 0 of FSDP2's layout alone, on the meta device: Python, planning and messages, no arithmetic.
``step``: median of three. ``plan``: what the first step takes, and what Python keeps of it.
``sent``: messages and bytes that the rank gives to them, with dense gradients. ``sketches``: the
same of the mean over ranks at "compressed" in 32 bits, and its plan.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from flora_dist import Flora
from flora_dist.cluster.planner.config_file import read_model
from flora_dist.core.comm.groups import MeshReducer
from flora_dist.core.layouts.dtensor import TilesAlong
from flora_dist.core.layouts.replicated import whole
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.gradients import average
from flora_dist.gradients.average import Averaging
from flora_dist.gradients.flow import Flow, Source, flow_for, geometry_for
from flora_dist.gradients.request import SketchRequest
from flora_dist.gradients.route import Route
from tests.bench.process_plan import MODELS

RANKS = (1, 8, 64, 512, 1024)
STEPS = 3
KIBI = 2**10
Shapes = dict[str, tuple[int, ...]]


def llama_7b() -> Shapes:
    """291 tensors."""
    return {p.name: p.shape for p in read_model(MODELS / "llama_7b.json").parameters}


def experts(layers: int = 16, count: int = 64, width: int = 2048, inner: int = 1024) -> Shapes:
    """A decoder whose layers have 64 experts each, as transformers holds them: 3-D tensors."""
    shapes: Shapes = {"embed": (50304, width), "norm": (width,), "head": (50304, width)}
    for layer in range(layers):
        shapes |= {f"{layer}.{name}": (width, width) for name in ("q", "k", "v", "o")}
        shapes |= {f"{layer}.norm{number}": (width,) for number in (1, 2)}
        shapes[f"{layer}.router"] = (count, width)
        shapes[f"{layer}.up"] = (count, 2 * inner, width)
        shapes[f"{layer}.down"] = (count, width, inner)
    return shapes


NETWORKS: dict[str, Callable[[], Shapes]] = {"llama_7b": llama_7b, "experts": experts}


def main() -> None:
    """Prints the table, or measures one world."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--network", choices=NETWORKS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.world is not None:
        print(json.dumps(measure(NETWORKS[asked.network](), asked.world)))
        return
    print("| network, ranks | step, ms | plan, ms, KiB | sent: messages, KiB |", end=" ")
    print("sketches: mean, ms | plan, ms, KiB | sent: messages, KiB |")
    print("|---|---|---|---|---|---|---|")
    for network in [asked.network] if asked.network else NETWORKS:
        for world in map(int, asked.ranks.split(",")):
            print(row(f"{network}, {world:,}", found(network, world)), flush=True)


def found(network: str, world: int) -> dict[str, float]:
    """Measured in a process of its own: a group lasts as long as that."""
    command = [sys.executable, "-m", "tests.bench.scale", "--network", network]
    told = subprocess.run(
        [*command, "--world", str(world)], check=True, capture_output=True, text=True
    )
    numbers: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return numbers


def row(name: str, numbers: dict[str, float]) -> str:
    """One line of the table."""
    cells = []
    for kind in ("", "sketches "):
        cells.append(f"{numbers[f'{kind}step']:,.1f}")
        cells.append(f"{numbers[f'{kind}plan']:,.0f}, {numbers[f'{kind}kept']:,.0f}")
        cells.append(f"{numbers[f'{kind}messages']:.0f}, {numbers[f'{kind}bytes']:,.0f}")
    return f"| {name} | {' | '.join(cells)} |"


def measure(shapes: Shapes, world: int) -> dict[str, float]:
    """Milliseconds, KiB and messages of rank 0."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    sent: list[int] = []
    MeshReducer.sum_ = _noting(sent)  # type: ignore[method-assign]
    parameters = _parameters(shapes, world)
    optimizer = Flora(parameters.items(), lr=1e-3, rank=4, block=64)
    first, kept = _traced(optimizer.step)
    sent.clear()
    optimizer.step()
    numbers = {"messages": len(sent), "bytes": sum(sent) / KIBI, "kept": kept / KIBI}
    times = [_milliseconds(optimizer.step) for _ in range(STEPS)]
    numbers |= {"step": statistics.median(times), "plan": first}
    return numbers | _of_sketches(optimizer)


def _parameters(shapes: Shapes, world: int) -> dict[str, nn.Parameter]:
    mesh = init_device_mesh("cpu", (world,))
    made = {}
    for name, shape in shapes.items():
        local = (min(shape[0], -(-shape[0] // world)), *shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        made[name], gradient = (
            nn.Parameter(
                DTensor.from_local(
                    torch.empty(local, device="meta"),
                    mesh,
                    [Shard(0)],
                    run_check=False,
                    shape=torch.Size(shape),
                    stride=stride,
                )
            )
            for _ in range(2)
        )
        made[name].grad = gradient.detach()
    return made


def _noting(sent: list[int]) -> Any:
    """In place of the reducer's: as many numbers from the CPU, since meta has none to send."""

    def sum_(self: MeshReducer, message_S: Tensor) -> None:
        there = torch.empty(message_S.shape, dtype=message_S.dtype)
        sent.append(there.nbytes)
        for axis in self.axes:
            dist.all_reduce(there, group=self.mesh.get_group(axis))

    return sum_


def _of_sketches(optimizer: Flora) -> dict[str, float]:
    """The plan of one mean over ranks, and what it sends."""
    request = SketchRequest(gradients="compressed", gradient_bits=32)
    slots = [s for s in optimizer.slots() if geometry_for(s, request).rank is not None]
    flows = [_flow(slot, request, optimizer) for slot in slots]
    averaging: list[Averaging] = []

    def plan() -> None:
        averaging.append(
            Averaging(
                [flow.accumulator for flow in flows],
                [flow.source.route for flow in flows],
                wire_dtype=None,
            )
        )

    spent, kept = _traced(plan)
    sent = _on_meta()
    times = []
    for _ in range(3):
        for flow in flows:
            own = flow.accumulator
            own.sums_ENKR = torch.empty(own.sums_shape, dtype=own.dtype, device="meta")
        sent.clear()
        times.append(_milliseconds(averaging[0].run))
    return {
        "sketches plan": spent,
        "sketches kept": kept / KIBI,
        "sketches step": statistics.median(times),
        "sketches messages": len(sent),
        "sketches bytes": sum(sent) / KIBI,
    }


def _on_meta() -> list[int]:
    """Let means stay where they are; the bytes of each collective that comes."""
    sent: list[int] = []

    def scattered(lines_WS: Tensor, _: dist.ProcessGroup) -> Tensor:
        sent.append(lines_WS.nbytes)
        return lines_WS.new_empty(lines_WS.shape[1])

    average.group_device = lambda tensor, _: tensor.device  # type: ignore[attr-defined]
    average.reduce_scatter = scattered  # type: ignore[attr-defined]
    return sent


def _flow(slot: Trainable, request: SketchRequest, optimizer: Flora) -> Flow:
    """As FSDP2's adapter makes it, without unsharding."""
    sharded = slot.tensor
    assert isinstance(sharded, DTensor)
    shape, mesh = tuple(sharded.shape), sharded.device_mesh
    route = Route(
        kept=TilesAlong(sharded, 0), scatter=mesh.get_group(0), divisor=float(mesh.size(0))
    )
    whole_tensor = torch.empty(shape, device="meta")
    source = Source(tensor=whole_tensor, visible=sharded, tiles=whole(shape), route=route)
    return flow_for(slot, source, geometry_for(slot, request), optimizer)


def _milliseconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - began)


def _traced(action: Callable[[], Any]) -> tuple[float, int]:
    """Milliseconds, tracing included, and bytes that Python keeps."""
    gc.collect()
    tracemalloc.start()
    spent = _milliseconds(action)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return spent, kept


if __name__ == "__main__":
    main()
