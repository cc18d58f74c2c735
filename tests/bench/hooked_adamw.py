# SPDX-License-Identifier: Apache-2.0
"""What hooks of DDP leave of gradients, for AdamW and for Flora: loss, and second moments.

    python -m tests.bench.hooked_adamw      about twenty minutes on one core

One layer of 128 (llama_900k_bytes) on the standard library's sources, 320 steps of 16 sequences,
with warm-up and linear decay; one process, since the ranks' mean is taken before the optimizer
sees anything. `powersgd r`: torch's own hook at rank r, with its error feedback, from the second
step on. Of a matrix of 128 x 128 rank 8, 4 and 2 send 1/8, 1/16 and 1/32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import flora_dist
from flora_dist.trainer.config import ScheduleConfig
from flora_dist.trainer.config_data import STDLIB, DataConfig, ModelConfig
from flora_dist.trainer.data import Order, read_corpus
from flora_dist.trainer.model import build_model, read_model_config, sum_of_losses
from flora_dist.trainer.optimizers import schedule_factor
from flora_dist.trainer.tokenizer import ByteTokenizer

STEPS, BATCH, VALIDATION, LENGTH = 320, 16, 160, 64
BLOCK = 64
RATES = (1e-3, 2e-3, 4e-3)
Batch = tuple[Tensor, Tensor]
Hook = Callable[[DistributedDataParallel], None]


def no_hook(wrapped: DistributedDataParallel) -> None:
    """DDP's own mean."""


def flora(**settings: Any) -> Hook:
    """`flora_hook` with these settings."""

    def register(wrapped: DistributedDataParallel) -> None:
        named = wrapped.module.named_parameters()
        state = flora_dist.ddp.FloraState(named, block=BLOCK, **settings)
        wrapped.register_comm_hook(state, flora_dist.ddp.flora_hook)

    return register


def power_sgd(rank: int) -> Hook:
    """torch's PowerSGD with error feedback, which keeps a dense buffer for it."""

    def register(wrapped: DistributedDataParallel) -> None:
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=2
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return register


HOOKS: dict[str, Hook] = {
    "none": no_hook,
    **{f"flora, ratio {ratio}": flora(rank=BLOCK // ratio) for ratio in (2, 4, 8, 16)},
    **{f"flora, {bits} bits": flora(rank="block", wire_bits=bits) for bits in (4, 2, 1)},
    **{f"powersgd {rank}": power_sgd(rank) for rank in (8, 4, 2)},
}


def one_layer() -> nn.Module:
    """The model of every run, the same weights each time."""
    config = ModelConfig(config="configs/model/llama_900k_bytes.json")
    network = read_model_config(config, ByteTokenizer(), LENGTH)
    network.num_hidden_layers = 1
    return build_model(config, network, seed=0)


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """torch's."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def blend(model: nn.Module, lr: float) -> Optimizer:
    """Flora's default."""
    return flora_dist.Flora(model.named_parameters(), lr=lr)


OPTIMIZERS = {"adamw": adamw, "flora": blend}


def trained(
    batch: Callable[[int], Batch], validation: Batch, optimizer_name: str, hook: Hook, lr: float
) -> tuple[float, float]:
    """Validation loss in nats per token; AdamW: the mean second moment of the layers' matrices."""
    model = one_layer()
    wrapped = DistributedDataParallel(model)
    hook(wrapped)
    optimizer = OPTIMIZERS[optimizer_name](model, lr)
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
    if optimizer_name != "adamw":
        return loss, math.nan
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in matrices])
    return loss, float(moments.mean())


def main() -> None:
    """A line for each optimizer, hook and rate."""
    data = DataConfig(corpus=STDLIB, sequence_length=LENGTH)
    corpus = read_corpus(data, ByteTokenizer())
    order = Order(sequences=len(corpus.train), global_batch=BATCH, seed=0)

    def batch(step: int) -> Batch:
        (part,) = order.micro_batches(step, micro_batch=BATCH, process_rank=0, world_size=1)
        return corpus.train.batch(part)

    first: Batch = corpus.validation.batch(np.arange(VALIDATION))
    print(f"{'optimizer':>9} {'hook':>16} {'lr':>6} {'validation':>10} {'second moment':>13}")
    for name in OPTIMIZERS:
        for hook in HOOKS:
            for lr in RATES:
                loss, moment = trained(batch, first, name, HOOKS[hook], lr)
                print(f"{name:>9} {hook:>16} {lr:6g} {loss:10.4f} {moment:13.2e}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's, of what DDP calls
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main()
    dist.destroy_process_group()
