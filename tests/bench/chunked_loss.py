# SPDX-License-Identifier: Apache-2.0
"""Prints what a forward and a backward hold at most, by the tokens of a chunk of losses.

    python -m tests.bench.chunked_loss                          llama-60m, 1 x 1024 tokens
    python -m tests.bench.chunked_loss --model llama_tiny --tokens 256 --chunks 64

One process, weights in bfloat16, checkpointing; each gradient is freed as soon as it is complete.
Bytes of tensors besides the weights, counted at every operator, the planner's beside them.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from flora_dist.cluster.planner.config_file import read_model
from flora_dist.cluster.planner.estimate import estimate
from flora_dist.cluster.planner.methods import asked
from flora_dist.cluster.planner.request import BACKENDS, PURE, Request
from flora_dist.core.state.settings import FloraConfig
from flora_dist.trainer.chunked_loss import chunk_loss
from flora_dist.trainer.model import sum_of_losses
from tests.bench.memory import LiveBytes
from tests.bench.process_plan import MODELS
from tests.planner.runs import build

MEBI = 2**20
WHOLE = 0


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunks", default="256,64", help="tokens at once, by commas")
    asks = parser.parse_args()
    print("| tokens at once | loss | MiB at most | planned | seconds |")
    print("|---|---|---|---|---|")
    for chunk in (WHOLE, *map(int, asks.chunks.split(","))):
        began = time.perf_counter()
        loss, peak = measured(asks.model, asks.tokens, chunk)
        spent, plan = time.perf_counter() - began, planned(asks.model, asks.tokens, chunk)
        name = f"{chunk:,}" if chunk else f"{asks.tokens:,}, all"
        print(f"| {name} | {loss:.5f} | {peak / MEBI:,.0f} | {plan / MEBI:,.0f} | {spent:.1f} |")


def measured(name: str, tokens: int, chunk: int) -> tuple[float, int]:
    """Mean loss of a token, and the most bytes that were alive besides weights."""
    model = build(MODELS / f"{name}.json")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
        parameter.register_post_accumulate_grad_hook(_freed)
    if chunk:
        chunk_loss(model, chunk)
    words: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randint(words, (2, 1, tokens), generator=generator)
    with LiveBytes(known=model.parameters()) as live:
        loss = sum_of_losses(model, inputs, labels)
        (loss / tokens).backward()  # type: ignore[no-untyped-call]  # torch's, without types
    return float(loss.detach()) / tokens, live.peak


def _freed(parameter: Tensor) -> None:
    parameter.grad = None


def planned(name: str, tokens: int, chunk: int) -> int:
    """Activations, a gradient, and what comes and goes."""
    request = Request(
        device="cpu",
        model=read_model(MODELS / f"{name}.json"),
        backend=BACKENDS["ddp"],
        flora=FloraConfig(),
        sequence_length=tokens,
        precision=PURE,
        checkpointing=True,
        loss_chunk=chunk or None,
        step_in_backward=True,
    )
    held = estimate(request, asked(request)).held
    return sum(held[name].total for name in ("activations", "gradients", "temporary"))


if __name__ == "__main__":
    main()
