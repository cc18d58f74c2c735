# SPDX-License-Identifier: Apache-2.0
"""A small language model, trained by Flora's kernels, by torch's operators and by AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flora_dist import Flora
from tests.kernels.gpu.runs import DEVICE, by_torch, stepped, where_covered

# After some steps two paths that round differently part; their losses do not part by this much.
LARGEST_DIFFERENCE = 0.05


def training(is_rehearsal: bool) -> dict[str, Any]:
    """Losses and tokens per second."""
    width, layers, steps, tokens = (32, 1, 3, 64) if is_rehearsal else (1024, 8, 60, 16384)
    found: dict[str, Any] = {"faults": []}

    def flora(model: nn.Module) -> torch.optim.Optimizer:
        return Flora(model.named_parameters(), lr=1e-3)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    for name, make, phases in (
        ("Flora", flora, where_covered),
        ("Flora, torch's operators", flora, by_torch),
        ("AdamW, fused", adamw, by_torch),
    ):
        with stepped(phases):
            found[name] = _train(make, width, layers, steps, tokens)
    own, other = found["Flora"], found["Flora, torch's operators"]
    if not own["last loss"] < own["first loss"]:
        found["faults"].append("the loss does not fall")
    if not abs(own["last loss"] - other["last loss"]) < LARGEST_DIFFERENCE:
        found["faults"].append("kernels and torch's operators reach other losses")
    return found


def _train(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    width: int,
    layers: int,
    steps: int,
    tokens: int,
) -> dict[str, float]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    model = nn.Sequential(
        nn.Embedding(256, width), nn.TransformerEncoder(layer, layers), nn.Linear(width, 256)
    ).to(device=DEVICE, dtype=torch.bfloat16)
    optimizer, losses = make(model), []
    start = time.perf_counter()
    for step in range(steps):
        if step == steps // 3:  # whatever is compiled or made at first is there now
            _wait()
            start = time.perf_counter()
        losses.append(_loss(model, tokens, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    _wait()
    seconds = time.perf_counter() - start
    values = torch.stack(losses).tolist()
    return {
        "first loss": values[0],
        "last loss": values[-1],
        "tokens/s": (steps - steps // 3) * tokens / seconds,
    }


def _loss(model: nn.Module, tokens: int, step: int) -> Tensor:
    """Of counting: each token follows from the one before."""
    draw = torch.Generator().manual_seed(step)
    first = torch.randint(0, 256, (tokens // 64, 1), generator=draw)
    text = ((first + 3 * torch.arange(65)) % 256).to(DEVICE)
    mask = nn.Transformer.generate_square_subsequent_mask(64, device=DEVICE, dtype=torch.bfloat16)
    hidden = model[0](text[:, :-1])  # type: ignore[index]
    hidden = model[1](hidden, mask=mask)  # type: ignore[index]
    logits = model[2](hidden)  # type: ignore[index]
    loss = functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
