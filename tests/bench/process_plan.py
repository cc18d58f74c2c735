# SPDX-License-Identifier: Apache-2.0
"""The rows of ``process_memory.py``, and what the planner says of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flora_dist.cluster.planner.config_file import read_model
from flora_dist.cluster.planner.estimate import estimate
from flora_dist.cluster.planner.methods import asked, others
from flora_dist.cluster.planner.request import BACKENDS, PURE, Request
from flora_dist.core.state.settings import FloraConfig

MODELS = Path(__file__).parents[2] / "configs" / "model"
PROCESSES = {"one": 1, "fsdp2": 2, "zero1": 2, "zero2": 2, "zero3": 2}
"""Backend -> processes."""
BUCKET = 20_000_000
"""Elements that ZeRO reduces at once, and that it gathers at once over gloo."""
_MIXED = {name: "float32" if name == "one" else "bfloat16" for name in PROCESSES}
"""Backend -> the precision that keeps weights in float32."""


PACKAGES = {
    "adamw 8 bits (torchao)": "AdamW 8-bit (torchao)",
    "adamw 8 bits (bitsandbytes)": "AdamW 8-bit (bitsandbytes)",
}
"""Optimizers of other packages -> their names in ``peers.py``."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training run."""

    model: str
    backend: str
    optimizer: str
    gradients: str = "dense"
    bits: int = 32
    """Of each number of sketched gradients; below 32, of all numbers of a block."""
    precision: str
    steps: str = "after"
    """``within`` backward, or after it."""
    micro_batches: int = 4

    def __str__(self) -> str:
        sketched = "" if self.gradients == "dense" else f" {self.gradients}"
        sketched += f" 64 x {self.bits} bits" if self.bits < 32 else ""
        within = " in backward" if self.steps == "within" else ""
        batches = "" if self.micro_batches == 4 else f", {self.micro_batches} micro-batch"
        return f"{self.backend}, {self.optimizer}{sketched}{within}, {self.precision}{batches}"

    def as_json(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self))


def rows(model: str) -> Iterator[Row]:
    """Optimizers on each backend: with float32 weights, and Flora without."""
    for backend, precision in _MIXED.items():
        for optimizer in ("adamw", *PACKAGES, "adafactor") if backend == "one" else ("adamw",):
            yield Row(model=model, backend=backend, optimizer=optimizer, precision=precision)
        for each in (precision, PURE):
            for gradients, bits in (("dense", 32), ("compressed", 32), ("compressed", 4)):
                yield Row(
                    model=model,
                    backend=backend,
                    optimizer="flora",
                    gradients=gradients,
                    bits=bits,
                    precision=each,
                )
        yield from _in_backward(model, backend)


def _in_backward(model: str, backend: str) -> Iterator[Row]:
    """Steps within backward beside those after it, where they can be."""
    alone = partial(Row, model=model, backend=backend, optimizer="flora", precision=PURE)
    if backend.startswith("zero"):
        return
    for steps in ("after", "within"):
        yield alone(steps=steps, micro_batches=1)
    if backend == "one":
        yield alone(steps="within", gradients="compressed", bits=4)
    else:
        yield alone(steps="within", gradients="sharded")


def planned(row: Row) -> int:
    """The plan's total in bytes; 0 for what the planner does not know."""
    request = Request(
        device="cpu",
        model=read_model(MODELS / f"{row.model}.json"),
        gpus=PROCESSES[row.backend],
        backend=BACKENDS["ddp" if row.backend == "one" else row.backend],
        flora=FloraConfig(rank=4, block=64),
        gradients=row.gradients,
        gradient_bits=row.bits,
        sequence_length=128,
        accumulate=row.micro_batches,
        precision=row.precision,
        checkpointing=True,
        bucket=BUCKET,
        step_in_backward=row.steps == "within",
    )
    methods = [asked(request)] if row.optimizer == "flora" else list(others(request))
    labels = {"flora": methods[0].label, "adamw": "AdamW"} | dict.fromkeys(PACKAGES, "AdamW, 8-bit")
    found = [method for method in methods if method.label == labels.get(row.optimizer)]
    return estimate(request, found[0]).total if found else 0
