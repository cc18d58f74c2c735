# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft beside full training, from the same random weights, in as many bytes of state.

    python -m tests.bench.lora            three runs of the quality bench's length

The network, tokens, order, schedule and steps are those of `tests.bench.quality`; AdamW trains the
adapters of every linear layer but the head. Their rank is the largest whose state is not above that
of Flora's default there. Embedding, head and norms stand still, as in fine-tuning; the network they
belong to has learned nothing here, so this is not what adapters are for.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from flora_dist.trainer.arrange import with_adapters
from flora_dist.trainer.backend import spread
from flora_dist.trainer.config_data import STDLIB, LoraConfig
from flora_dist.trainer.data import Order
from flora_dist.trainer.interrupt import StopRequest
from flora_dist.trainer.loop import TrainingRun, train
from flora_dist.trainer.metrics import Metrics
from flora_dist.trainer.model import build_model
from flora_dist.trainer.optimizers import schedule_factor
from flora_dist.trainer.progress import Silence
from tests.bench.quality_plan import BASE_LR, FULL, Row, Run
from tests.bench.quality_run import Settings, bench_of, config_of_run

SETTINGS = Settings(model="configs/model/llama_9m.json", data=STDLIB, size=FULL)
ROW = Row(name="LoRA", factor="adapters", optimizer="adamw", options={"weight_decay": 0.0})
RESULTS = Path(__file__).parent / "results" / "projection.json"
FLORA = "blend, ratio 4, blend_gain 1"
EXPONENTS = (0, 1, 2)


def bytes_of_default() -> int:
    """What Flora's default keeps of this network, as its run of the first table counted it."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    (flora,) = (row for row in rows if row["row"] == FLORA)
    return int(flora["state_bytes"])


def largest_rank(state_bytes: int) -> int:
    """Of adapters whose AdamW keeps no more bytes."""
    of_one = 2 * 4 * sum(p.numel() for p in adapters(1).parameters() if p.requires_grad)
    return max(1, state_bytes // of_one)


def adapters(rank: int) -> Any:
    """The quality bench's network, of which adapters train."""
    bench = bench_of(SETTINGS)
    config = config_of_run(SETTINGS, ROW, Run(row=ROW.name, exponent=0, seed=0))
    model = build_model(config.model, bench.network, seed=0)
    return with_adapters(model, LoraConfig(rank=rank))


def trained(rank: int, exponent: int) -> dict[str, Any]:
    """One run; as JSON knows it."""
    bench = bench_of(SETTINGS)
    config = config_of_run(SETTINGS, ROW, Run(row=ROW.name, exponent=exponent, seed=0))
    model = adapters(rank)
    module = spread(model, config, bench.world)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lr = BASE_LR * 2.0**exponent
    optimizer = torch.optim.AdamW(own, lr=lr, **ROW.options)
    factor = schedule_factor(config.schedule, config.train.steps)
    training = TrainingRun(
        config=config,
        world=bench.world,
        corpus=bench.corpus,
        order=Order(
            sequences=len(bench.corpus.train), global_batch=config.train.global_batch, seed=0
        ),
        spread=module,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        gradients=None,
    )
    with redirect_stderr(io.StringIO()):
        measured = train(
            training, stop=StopRequest(), metrics=Metrics(None, ()), progress=Silence()
        )
    return {
        "rank": rank,
        "lr": lr,
        "state_bytes": measured.state_bytes,
        "validation_loss": measured.validation_loss,
    }


def main() -> None:
    """Print a line for each learning rate as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exponents", type=int, nargs="+", default=EXPONENTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rank = largest_rank(bytes_of_default())
    for exponent in given.exponents:
        sys.stdout.write(json.dumps(trained(rank, exponent)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
