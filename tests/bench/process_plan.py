# SPDX-License-Identifier: Apache-2.0
"""The rows of ``process_memory.py``, and what the planner says of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flora_dist.cluster.planner.config_file import read_model
from flora_dist.cluster.planner.estimate import estimate
from flora_dist.cluster.planner.methods import asked, others
from flora_dist.cluster.planner.request import BACKENDS, PURE, Request
from flora_dist.core.state.settings import FloraConfig

MODELS = Path(__file__).parents[2] / "configs" / "model"
PROCESSES = {"one": 1, "fsdp2": 2, "zero2": 2}
"""Backend -> processes."""
_MIXED = {"one": "float32", "fsdp2": "bfloat16", "zero2": "bfloat16"}
"""Backend -> the precision that keeps weights in float32."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training run."""

    model: str
    backend: str
    optimizer: str
    gradients: str = "dense"
    precision: str
    steps: str = "after"
    """``within`` backward, or after it."""
    micro_batches: int = 4

    def __str__(self) -> str:
        sketched = "" if self.gradients == "dense" else f" {self.gradients}"
        within = " in backward" if self.steps == "within" else ""
        batches = "" if self.micro_batches == 4 else f", {self.micro_batches} micro-batch"
        return f"{self.backend}, {self.optimizer}{sketched}{within}, {self.precision}{batches}"

    def as_json(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self))


def rows(model: str) -> Iterator[Row]:
    """Optimizers on each backend: with float32 weights, and Flora without."""
    for backend, precision in _MIXED.items():
        for optimizer in ("adamw", "adafactor") if backend == "one" else ("adamw",):
            yield Row(model=model, backend=backend, optimizer=optimizer, precision=precision)
        for each in (precision, PURE):
            for gradients in ("dense", "compressed"):
                yield Row(
                    model=model,
                    backend=backend,
                    optimizer="flora",
                    gradients=gradients,
                    precision=each,
                )
        if backend == "zero2":
            continue
        for steps in ("after", "within"):
            yield Row(
                model=model,
                backend=backend,
                optimizer="flora",
                precision=PURE,
                steps=steps,
                micro_batches=1,
            )


def planned(row: Row) -> int:
    """The plan's total in bytes; 0 for what the planner does not know."""
    if row.steps == "within" and row.backend != "one":
        return 0
    request = Request(
        model=read_model(MODELS / f"{row.model}.json"),
        gpus=PROCESSES[row.backend],
        backend=BACKENDS["ddp" if row.backend == "one" else row.backend],
        flora=FloraConfig(rank=4, block=64),
        gradients=row.gradients,
        gradient_bits=32,
        sequence_length=128,
        accumulate=row.micro_batches,
        precision=row.precision,
        checkpointing=True,
        bucket=20_000_000,
    )
    methods = [asked(request)] if row.optimizer == "flora" else list(others(request))
    labels = {"flora": methods[0].label, "adamw": "AdamW"}
    found = [
        dataclasses.replace(method, in_backward=row.steps == "within")
        for method in methods
        if method.label == labels.get(row.optimizer)
    ]
    return estimate(request, found[0]).total if found else 0
