# SPDX-License-Identifier: Apache-2.0
"""Loss of llama-60m and 130m on one GPU: AdamW tuned, beside Flora's rules and few-bit gradients.

Weights in fp32, products in bf16 by autocast, text from the Python files of the machine. Every row
has the same learning rates, the same sequences in the same order, gradients clipped at a norm of 1,
and a cosine after 5 % of warm-up. A run that has ended is a line of a file, and is not run again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.gradients.attach import attach
from tests.gpu.decoder import SHAPES, TOY, Decoder, Shape
from tests.gpu.text import Text, python_text
from tests.kernels.gpu.runs import DEVICE

WARM_UP, LAST = 0.05, 0.1
LARGEST_NORM = 1.0
Made = tuple[torch.optim.Optimizer, Callable[[], object]]
"""An optimizer, and what clips its gradients."""


def _adamw(model: nn.Module, lr: float) -> Made:
    named = list(model.named_parameters())
    adamw = torch.optim.AdamW(named, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    clip = partial(nn.utils.clip_grad_norm_, [each for _, each in named], LARGEST_NORM)
    return adamw, clip


def _flora(model: nn.Module, lr: float, **settings: Any) -> Made:
    flora = Flora(model.named_parameters(), lr=lr, **settings)
    return flora, partial(flora.clip_grad_norm_, LARGEST_NORM)


def _few_bits(model: nn.Module, lr: float) -> Made:
    """All 64 numbers of a block, in 4 bits each."""
    flora = Flora(model.named_parameters(), lr=lr)
    attach(model, flora, "compressed", gradient_rank=64, gradient_bits=4)
    return flora, partial(flora.clip_grad_norm_, LARGEST_NORM)


_ENDS = {role: {"orthogonalise": None} for role in ("head", "embedding")}
ROWS: dict[str, Callable[[nn.Module, float], Made]] = {
    "AdamW": _adamw,
    "Flora, default": _flora,
    "Flora, orthogonal tiles": partial(_flora, orthogonalise=64, roles=_ENDS),
    "Flora, gradients 64 x 4 bits": _few_bits,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long the runs of one network are; equal for all rows."""

    shape: Shape
    rates: Sequence[float]
    steps: int = 600
    micro_batches: int = 2
    sequences: int = 64
    """Of one micro-batch."""
    length: int = 256
    judged: int = 256
    """Sequences of validation."""
    text_bytes: int = 64_000_000


PLANS = {
    "60m": Plan(shape=SHAPES["60m"], rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    "130m": Plan(shape=SHAPES["130m"], rates=(5e-4, 1e-3, 2e-3)),
}
REHEARSED = Plan(
    shape=TOY, rates=(1e-3, 4e-3), steps=3, sequences=2, length=16, judged=4, text_bytes=100_000
)


def quality(name: str, is_rehearsal: bool, kept: Path) -> dict[str, Any]:
    """Every run of a plan that the file ``kept`` lacks; then all of them, by row."""
    plan = REHEARSED if is_rehearsal else PLANS[name]
    done = finished(kept)
    missing = [
        (row, rate) for rate in plan.rates for row in ROWS if (row, rate) not in _asked(done)
    ]
    text = python_text(plan.shape.words, plan.text_bytes) if missing else None
    for row, rate in missing:
        assert text is not None
        run = {"row": row, "lr": rate, **train(plan, text, row, rate)}
        with kept.open("a") as file:
            file.write(json.dumps(run) + "\n")
        left = len(missing) - missing.index((row, rate)) - 1
        print(f"{name}: {row}, lr {rate:g}: {run['loss']:.4f}; {left} left", file=sys.stderr)
        done.append(run)
    # One learning rate may be too large for a row; all of them are not.
    learned = {run["row"] for run in done if run["loss"] < run["first loss"]}
    faults = [f"{row}: no learning rate lowers the loss" for row in ROWS if row not in learned]
    tokens = plan.steps * plan.micro_batches * plan.sequences * plan.length
    return {"faults": faults, "network": name, "tokens": tokens, "runs": done}


def finished(kept: Path) -> list[dict[str, Any]]:
    """The runs of a file; a last line that was cut off by a kill is no run."""
    if not kept.exists():
        return []
    lines = kept.read_text().split("\n")
    # What follows the last line break was being written when the process ended.
    kept.write_text("".join(line + "\n" for line in lines[:-1]))
    return [json.loads(line) for line in lines[:-1]]


def _asked(runs: Sequence[dict[str, Any]]) -> set[tuple[str, float]]:
    return {(run["row"], run["lr"]) for run in runs}


def train(plan: Plan, text: Text, row: str, rate: float) -> dict[str, Any]:
    """One run from the same weights; losses, bytes of state per parameter, tokens per second."""
    torch.manual_seed(0)
    model = Decoder(plan.shape).to(DEVICE)
    optimizer, clip = ROWS[row](model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_factor, steps=plan.steps))
    judged = text.judged(plan.judged, plan.length)
    first = _judge(model, judged, plan.sequences)
    draw = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(plan.steps):
        if step == plan.steps // 3:  # kernels are compiled and state is made by then
            _wait()
            start = time.perf_counter()
        for _ in range(plan.micro_batches):
            tokens = text.batch(plan.sequences, plan.length, draw)
            _backward(model, tokens, plan.micro_batches)
        clip()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    _wait()
    seconds = time.perf_counter() - start
    counted = (plan.steps - plan.steps // 3) * plan.micro_batches * plan.sequences * plan.length
    return {
        "first loss": first,
        "loss": _judge(model, judged, plan.sequences),
        "state bytes per parameter": _state_bytes(optimizer, model),
        "tokens/s": counted / seconds,
    }


def _backward(model: nn.Module, tokens: Tensor, micro_batches: int) -> None:
    with _in_bf16():
        loss = model(tokens.to(DEVICE, non_blocking=True)) / micro_batches
    loss.backward()


@torch.no_grad()
def _judge(model: nn.Module, judged: Tensor, sequences: int) -> float:
    with _in_bf16():
        losses = [model(part.to(DEVICE)) * len(part) for part in judged.split(sequences)]
    return (torch.stack(losses).sum() / len(judged)).item()


def _in_bf16() -> torch.autocast | nullcontext[None]:
    # On a CPU it costs time and shows nothing.
    return torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else nullcontext()


def _factor(step: int, steps: int) -> float:
    warm = max(1, int(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    part = (step - warm) / max(1, steps - warm)
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * part)) / 2


def _state_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    if isinstance(optimizer, Flora):
        held = optimizer.report().state_bytes
    else:
        values = [value for state in optimizer.state.values() for value in state.values()]
        held = sum(each.numel() * each.element_size() for each in values)
    return held / sum(each.numel() for each in model.parameters())


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
