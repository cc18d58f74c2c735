# SPDX-License-Identifier: Apache-2.0
"""Gradients kept as sketches: where that is refused, how it is attached, what it amounts to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from flora_dist.flora import Flora
from flora_dist.gradients.attach import Handle, attach
from flora_dist.gradients.flow import geometry_for
from flora_dist.gradients.report import GradientReport
from flora_dist.gradients.request import SketchRequest
from flora_dist.trainer.backend import largest_over_processes
from flora_dist.trainer.config import DENSE, Config, GradientsConfig


@dataclass(frozen=True, kw_only=True)
class SketchTotals:
    """Totals of a run's sketched gradients."""

    level: str
    """How they are kept: sharded, compressed or fused."""
    sketched: int
    """Parameters whose gradients are sketches."""
    dense: int
    """Parameters whose gradients stay the framework's."""
    held_bytes: int
    """Of sketches between backward and step, on the process that holds most."""
    sent_bytes: int
    """Of sketches given to one step's collectives, by the process that gives most."""

    def __str__(self) -> str:
        return f"{self.level}, {self.sketched} of {self.sketched + self.dense} parameters"


def check_level(config: Config) -> None:
    """Refuse sketches where optimizer or backend cannot keep them.

    Raises:
        ValueError: another optimizer than Flora, FSDP1, or a level that the backend cannot have.
    """
    level, name, backend = config.gradients.level, config.optimizer.name, config.backend.name
    if level == DENSE:
        return
    if name != "flora":
        raise ValueError(
            f"gradients.level={level!r} needs Flora, which steps on sketches; optimizer.name="
            f"{name!r} reads whole gradients. Set optimizer.name: flora, or gradients.level: "
            f"{DENSE}."
        )
    if backend == "fsdp1":
        raise ValueError(
            "FSDP1 reduces the flat gradient of a whole unit and shows no parameter's own before; "
            f"gradients.level={level!r} needs it. Set backend.name: fsdp2."
        )
    if backend == "ddp" and level == "sharded":
        raise ValueError(
            "ddp shards nothing, so gradients.level='sharded' has nothing to keep. Set "
            "gradients.level: compressed."
        )


def check_sizes(config: Config, optimizer: torch.optim.Optimizer) -> None:
    """Refuse settings that sketch nothing; ``optimizer`` may be over weights without memory.

    Raises:
        ValueError: a rank that does not fit the blocks, every gradient dense, or none under ddp.
    """
    chosen = config.gradients
    if chosen.level == DENSE or not isinstance(optimizer, Flora):
        return
    try:
        sizes = [geometry_for(slot, request_of(chosen)) for slot in optimizer.slots()]
    except ValueError as error:
        raise ValueError(f"gradients.rank does not fit the optimizer's blocks: {error}") from error
    sketched = [size for size in sizes if size.rank is not None]
    if not sketched:
        matrix = next((size for size in sizes if not size.is_vector), sizes[0])
        raise ValueError(
            f"gradients.level={chosen.level!r} would keep every gradient dense: "
            f"{matrix.dense_because}. Set gradients.rank below half of optimizer.block, or "
            f"gradients.level: {DENSE}."
        )
    if config.backend.name == "ddp" and len(sketched) == len(sizes):
        raise ValueError(
            "DDP's reducer needs a parameter of its own, and every parameter of this model would "
            "be sketched. Set backend.name: fsdp2."
        )


def keep_sketched(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: GradientsConfig
) -> Handle | None:
    """Let Flora's gradients be kept as the config says; None where they stay dense."""
    if config.level == DENSE or not isinstance(optimizer, Flora):
        return None
    request = request_of(config)
    return attach(
        module,
        optimizer,
        request.gradients,
        gradient_rank=request.gradient_rank,
        gradient_bits=request.gradient_bits,
        wire_bits=request.wire_bits,
        wire_dtype=request.wire_dtype,
        bucket_cap_mb=request.bucket_cap_mb,
    )


def request_of(config: GradientsConfig) -> SketchRequest:
    """The section in the words of ``attach``."""
    return SketchRequest(
        gradients=config.level,
        gradient_rank=config.rank,
        gradient_bits=config.bits,
        wire_bits=config.wire_bits,
        wire_dtype=config.wire_dtype,
        bucket_cap_mb=config.bucket_cap_mb,
    )


def totals(report: GradientReport | None, device: torch.device) -> SketchTotals | None:
    """The report in numbers, the same on every process, which must all call this."""
    if report is None:
        return None
    sketched = sum(row.is_sketched for row in report.rows)
    return SketchTotals(
        level=report.level,
        sketched=sketched,
        dense=len(report.rows) - sketched,
        held_bytes=largest_over_processes(report.held_bytes, device),
        sent_bytes=largest_over_processes(report.sent_bytes, device),
    )
