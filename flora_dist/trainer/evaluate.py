# SPDX-License-Identifier: Apache-2.0
"""Validation loss: a fixed slice, shared by the processes, weighted by tokens."""

from __future__ import annotations

import numpy as np
import torch

from flora_dist.trainer.backend import sum_over_processes
from flora_dist.trainer.data import IGNORED, Packed, evenly_spread
from flora_dist.trainer.model import sum_of_losses
from flora_dist.trainer.replicated import Spread, World


@torch.no_grad()
def validation_loss(
    spread: Spread, validation: Packed, world: World, *, sequences: int, micro_batch: int
) -> float:
    """Mean loss in nats per token of the slice, the same number on every process.

    Processes without a sequence of their own run a forward pass that counts for nothing: FSDP
    gathers weights in it, and every process has to join.
    """
    chosen = evenly_spread(len(validation), sequences)
    together = micro_batch * world.size
    padded = np.pad(chosen, (0, -len(chosen) % together), constant_values=-1)
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    spread.module.eval()
    for part in padded.reshape(-1, world.size, micro_batch)[:, world.process_rank]:
        inputs, labels = (t.to(world.device) for t in validation.batch(part))
        with spread.arithmetic():
            total[0] += sum_of_losses(spread.module, inputs, labels)
        total[1] += (labels != IGNORED).sum()
    spread.module.train()
    spread.free()
    loss, tokens = sum_over_processes(total).tolist()
    return float(loss / tokens)
