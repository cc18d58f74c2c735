# SPDX-License-Identifier: Apache-2.0
"""AdamW on what ``flora_hook`` leaves of gradients, beside AdamW: loss, and its second moments.

    python -m tests.bench.hooked_adamw      about two minutes on one core

configs/tiny.yaml on the standard library's sources, 400 steps of 16 sequences, with warm-up and
linear decay; one process, since the ranks' mean is taken before AdamW sees anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import flora_dist
from flora_dist.trainer.config import ScheduleConfig
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.data import Order, read_corpus
from flora_dist.trainer.model import sum_of_losses
from flora_dist.trainer.optimizers import schedule_factor
from flora_dist.trainer.tokenizer import ByteTokenizer
from tests.trainer.ragged import tiny_model
from tests.trainer.support import TINY

STEPS, BATCH, VALIDATION = 400, 16, 160
BLOCK = 64
RATIOS = (None, 2, 4, 8, 16)
RATES = (3e-3, 1e-2, 3e-2)
Batch = tuple[Tensor, Tensor]


def trained(
    batch: Callable[[int], Batch], validation: Batch, *, ratio: int | None, lr: float
) -> tuple[float, float]:
    """Validation loss in nats per token, and the mean second moment of the layers' matrices."""
    model = tiny_model(load_config(TINY))
    wrapped = DistributedDataParallel(model)
    if ratio is not None:
        state = flora_dist.ddp.FloraState(
            model.named_parameters(), rank=BLOCK // ratio, block=BLOCK
        )
        wrapped.register_comm_hook(state, flora_dist.ddp.flora_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = ScheduleConfig(name="linear", warmup_steps=STEPS // 10)
    scheduler = LambdaLR(optimizer, schedule_factor(schedule, STEPS))
    for step in range(STEPS):
        inputs, labels = batch(step)
        (sum_of_losses(wrapped, inputs, labels) / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        loss = float(sum_of_losses(model, *validation)) / validation[1].numel()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in matrices])
    return loss, float(moments.mean())


def main() -> None:
    """A line for each ratio and rate."""
    config = load_config(TINY)
    corpus = read_corpus(config.data, ByteTokenizer())
    order = Order(sequences=len(corpus.train), global_batch=BATCH, seed=0)

    def batch(step: int) -> Batch:
        (part,) = order.micro_batches(step, micro_batch=BATCH, process_rank=0, world_size=1)
        return corpus.train.batch(part)

    first: Batch = corpus.validation.batch(np.arange(VALIDATION))
    print(f"{'ratio':>6} {'lr':>6} {'validation':>10} {'second moment':>13}")
    for ratio in RATIOS:
        for lr in RATES:
            loss, moment = trained(batch, first, ratio=ratio, lr=lr)
            print(f"{ratio or 'none':>6} {lr:6g} {loss:10.4f} {moment:13.2e}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's, of what DDP calls
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main()
    dist.destroy_process_group()
