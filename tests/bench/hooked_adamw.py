# SPDX-License-Identifier: Apache-2.0
"""What hooks of DDP leave of gradients, for AdamW and for Flora: loss, and second moments.

    python -m tests.bench.hooked_adamw      about an hour of one core
    python -m tests.bench.hooked_adamw --resume --rows "adamw, none; adamw, flora 4 bits"

The best of three learning rates gets two seeds more. Finished runs are kept in runs.jsonl at once:
``--resume`` goes on after an interruption, and the table is of the rows that are complete. One
layer of 128 (llama_900k_bytes) on the standard library's sources, 320 steps of 16 sequences,
with warm-up and linear decay; one process, since the ranks' mean is taken before the optimizer
sees anything. `powersgd r`: torch's own hook at rank r, with its error feedback, from the second
step on. Of a matrix of 128 x 128 rank 8, 4 and 2 send 1/8, 1/16 and 1/32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
from flora_dist.trainer.data import Corpus, Order, read_corpus
from flora_dist.trainer.model import build_model, read_model_config, sum_of_losses
from flora_dist.trainer.optimizers import schedule_factor
from flora_dist.trainer.tokenizer import ByteTokenizer
from tests.bench.quality import Store, write_whole
from tests.bench.quality_plan import Row, Run, Size, best_exponent, lr_of, next_runs, rows_named

STEPS, BATCH, VALIDATION, LENGTH = 320, 16, 160, 64
BLOCK = 64
SIZE = Size(steps=STEPS, layers=1, grid=(0, 1, 2), extensions=0, seeds=3)
"""Of the learning rates, 1e-3 and twice and four times that, and of the seeds."""
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
    **{f"flora {bits} bits": flora(rank="block", wire_bits=bits) for bits in (4, 2, 1)},
    **{f"powersgd {rank}": power_sgd(rank) for rank in (8, 4, 2)},
    **{f"flora ratio {ratio}": flora(rank=BLOCK // ratio) for ratio in (2, 4, 8, 16)},
}


def one_layer(seed: int) -> nn.Module:
    """The model of a run."""
    config = ModelConfig(config="configs/model/llama_900k_bytes.json")
    network = read_model_config(config, ByteTokenizer(), LENGTH)
    network.num_hidden_layers = 1
    return build_model(config, network, seed=seed)


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """torch's."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def blend(model: nn.Module, lr: float) -> Optimizer:
    """Flora's default."""
    return flora_dist.Flora(model.named_parameters(), lr=lr)


OPTIMIZERS = {"adamw": adamw, "flora": blend}
ROWS = tuple(
    Row(name=f"{optimizer}, {hook}", factor=hook, optimizer=optimizer)
    for hook in HOOKS
    for optimizer in OPTIMIZERS
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """What every run reads."""

    corpus: Corpus
    validation: Batch

    def batch(self, step: int, seed: int) -> Batch:
        """The sequences of a step, in an order of the seed's."""
        order = Order(sequences=len(self.corpus.train), global_batch=BATCH, seed=seed)
        (part,) = order.micro_batches(step, micro_batch=BATCH, process_rank=0, world_size=1)
        return self.corpus.train.batch(part)


def read_text() -> Text:
    """The standard library's sources, as bytes."""
    corpus = read_corpus(DataConfig(corpus=STDLIB, sequence_length=LENGTH), ByteTokenizer())
    return Text(corpus=corpus, validation=corpus.validation.batch(np.arange(VALIDATION)))


def trained(text: Text, row: Row, run: Run) -> dict[str, Any]:
    """Validation loss in nats per token; AdamW: the mean second moment of the layers' matrices."""
    lr = lr_of(row, run.exponent, 1.0)
    model = one_layer(run.seed)
    wrapped = DistributedDataParallel(model)
    HOOKS[row.factor](wrapped)
    optimizer = OPTIMIZERS[row.optimizer](model, lr)
    schedule = ScheduleConfig(name="linear", warmup_steps=STEPS // 10)
    scheduler = LambdaLR(optimizer, schedule_factor(schedule, STEPS))
    for step in range(STEPS):
        inputs, labels = text.batch(step, run.seed)
        (sum_of_losses(wrapped, inputs, labels) / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        loss = float(sum_of_losses(model, *text.validation)) / text.validation[1].numel()
    return run._asdict() | {
        "lr": lr,
        "validation_loss": loss if math.isfinite(loss) else None,
        "second_moment": _second_moment(model, optimizer) if row.optimizer == "adamw" else None,
    }


def _second_moment(model: nn.Module, optimizer: Optimizer) -> float:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    return float(torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in matrices]).mean())


def table(store: Store, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each row whose runs are all there."""
    lines = []
    for row in rows:
        if next_runs([row], store.losses, SIZE):
            continue
        best = best_exponent(row.name, store.losses)
        seeds = [store.losses[Run(row.name, best, seed)] for seed in range(SIZE.seeds)]
        first = store.records[Run(row.name, best, 0)]
        by_lr = {
            store.records[r]["lr"]: loss
            for r, loss in store.losses.items()
            if r.row == row.name and r.seed == 0
        }
        lines.append(
            {"optimizer": row.optimizer, "hook": row.factor, "lr": first["lr"], "seeds": seeds}
            | {"mean": statistics.fmean(seeds), "spread": max(seeds) - min(seeds)}
            | {"second_moment": first["second_moment"], "by_lr": sorted(by_lr.items())}
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print a line for each row, write results.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.hooked_adamw", description=__doc__)
    parser.add_argument("--out", default="runs/hooked", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on in --out")
    parser.add_argument("--rows", help="names of rows, separated by semicolons")
    args = parser.parse_args(argv)
    rows = ROWS
    if args.rows is not None:
        rows = rows_named([name.strip() for name in args.rows.split(";")], ROWS)
    text = read_text()
    shared = {"size": asdict(SIZE), "corpus": text.corpus.fingerprint}
    store = Store(args.out, shared, resume=args.resume)
    by_name = {row.name: row for row in rows}
    while missing := next_runs(rows, store.losses, SIZE):
        record = trained(text, by_name[missing[0].row], missing[0])
        store.add(record)
        print(*(record[key] for key in ("row", "lr", "seed", "validation_loss")), flush=True)
    found = table(store, rows)
    about = {"torch": torch.__version__, "tokens": STEPS * BATCH * LENGTH, **shared}
    write_whole(args.out / "results.json", json.dumps(about | {"rows": found}, indent=1) + "\n")
    print(
        f"{'optimizer':>9} {'hook':>14} {'lr':>6} {'loss':>7} {'spread':>7} {'second moment':>13}"
    )
    for line in found:
        moment = "" if line["second_moment"] is None else f"{line['second_moment']:.2e}"
        print(
            f"{line['optimizer']:>9} {line['hook']:>14} {line['lr']:6g} {line['mean']:7.4f} "
            f"{line['spread']:7.4f} {moment:>13}"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's, of what DDP calls
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main()
    dist.destroy_process_group()
