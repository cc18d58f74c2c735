# SPDX-License-Identifier: Apache-2.0
"""One run of the quality bench: the trainer's corpus, model and loop on one process."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from flora_dist import Flora
from flora_dist.gradients.report import GradientReport
from flora_dist.trainer.backend import World, find_world, spread
from flora_dist.trainer.config import (
    BackendConfig,
    Config,
    EvaluationConfig,
    GradientsConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)
from flora_dist.trainer.config_data import DataConfig, ModelConfig
from flora_dist.trainer.data import Corpus, Order, read_corpus
from flora_dist.trainer.gradients import keep_sketched, totals
from flora_dist.trainer.interrupt import StopRequest
from flora_dist.trainer.loop import RunResult, TrainingRun, train
from flora_dist.trainer.metrics import Metrics
from flora_dist.trainer.model import (
    build_model,
    parameter_count,
    read_model_config,
    shapes_only,
    weight_dtype,
)
from flora_dist.trainer.optimizers import schedule_factor
from flora_dist.trainer.optional_imports import stay_offline
from flora_dist.trainer.progress import Silence
from flora_dist.trainer.tokenizer import ByteTokenizer
from tests.bench.quality_peers import adamw8, galore, muon
from tests.bench.quality_plan import CENTRE, Row, Run, Size, lr_of
from tests.bench.quality_weights import keep_norms


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a table share."""

    model: str
    """A transformers config; its vocabulary becomes that of bytes."""
    data: str
    """`python-stdlib`, a file or a folder."""
    size: Size
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is read once per process."""

    corpus: Corpus
    network: Any
    """The transformers config."""
    world: World

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return parameter_count(shapes_only(self.network))


@lru_cache(maxsize=1)
def bench_of(settings: Settings) -> Bench:
    """Read model config and corpus."""
    stay_offline()
    tokenizer, length = ByteTokenizer(), settings.size.sequence_length
    network = read_model_config(ModelConfig(config=settings.model), tokenizer, length)
    if settings.size.layers is not None:
        network.num_hidden_layers = settings.size.layers
    corpus = read_corpus(DataConfig(corpus=settings.data, sequence_length=length), tokenizer)
    world = find_world(BackendConfig(device=settings.device))
    return Bench(corpus=corpus, network=network, world=world)


def start_worker() -> None:
    """Take one core, and end with the process that started this one, however that ended."""
    torch.set_num_threads(1)
    # Ctrl-C reaches the workers too: they end at once, the parent has something to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # An executor's workers outlive a parent that was killed: they hold their own queue open.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for processes that multiprocessing started"
    parent.join()
    os._exit(1)


def train_one(settings: Settings, row: Row, run: Run) -> dict[str, Any]:
    """Train from scratch; returns what the table needs, as JSON knows it."""
    config = config_of_run(settings, row, run)
    dtype = weight_dtype(config.train)
    model = build_model(config.model, bench_of(settings).network, seed=run.seed, dtype=dtype)
    if row.norms is not None:
        keep_norms(model, getattr(torch, row.norms))
    return train_model(settings, row, run, model)


def train_model(settings: Settings, row: Row, run: Run, model: nn.Module) -> dict[str, Any]:
    """Train these weights; returns what the table needs, as JSON knows it."""
    bench = bench_of(settings)
    config = config_of_run(settings, row, run)
    module = spread(model, config, bench.world)
    lr = lr_of(row, run.exponent, bench.network.initializer_range, settings.size.factor)
    optimizer = build(row, model, lr=lr, seed=run.seed)
    handle = keep_sketched(module.module, optimizer, config.gradients)
    sketched = None if handle is None else handle.report()
    factor = schedule_factor(config.schedule, config.train.steps)
    training = TrainingRun(
        config=config,
        world=bench.world,
        corpus=bench.corpus,
        order=Order(
            sequences=len(bench.corpus.train),
            global_batch=config.train.global_batch,
            seed=run.seed,
        ),
        spread=module,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        gradients=totals(sketched, bench.world.device),
    )
    with redirect_stderr(io.StringIO()):  # Flora's summary, hundreds of times
        measured = train(
            training,
            stop=StopRequest(),
            metrics=Metrics(None, ()),
            progress=Silence(),
        )
    tokens = config.train.global_batch * settings.size.sequence_length
    held = {"gradient_bytes": gradient_bytes(model, sketched)}
    return run._asdict() | {"lr": lr} | held | _kept(measured, optimizer, tokens)


def _kept(measured: RunResult, optimizer: torch.optim.Optimizer, tokens: int) -> dict[str, Any]:
    compressed = 0.0
    if isinstance(optimizer, Flora):
        rows = optimizer.report().rows
        inside = sum(row.local_elements for row in rows if row.is_compressed)
        compressed = inside / sum(row.local_elements for row in rows)
    return {
        "validation_loss": measured.validation_loss,
        "training_loss": measured.loss,
        "state_bytes": measured.state_bytes,
        "adamw_bytes": measured.adamw_bytes,
        "compressed_share": compressed,
        "tokens_per_second": measured.tokens_per_second,
        "curve": [
            [record["step"] * tokens, record["validation_loss"]]
            for record in measured.records
            if "validation_loss" in record and record["step"] is not None
        ],
    }


def config_of_run(settings: Settings, row: Row, run: Run) -> Config:
    """The trainer's config: every row sees the same sequences in the same order."""
    size = settings.size
    steps, sequences = size.steps * row.steps_per_batch, size.global_batch // row.steps_per_batch
    warmup = int(steps * row.warmup)
    return Config(
        model=ModelConfig(config=settings.model),
        data=DataConfig(corpus=settings.data, sequence_length=size.sequence_length),
        # The loop takes the optimizer it is given; this section is only for its own programs.
        optimizer=OptimizerConfig(name="adamw", options={"lr": 0.0}),
        gradients=gradients_of(row),
        schedule=ScheduleConfig(name="cosine", warmup_steps=warmup, final_ratio=0.1),
        train=TrainConfig(
            steps=steps,
            global_batch=sequences,
            # In full the sum over micro-batches is the same, and one pass is quicker.
            micro_batch=sequences // row.micro_batches,
            seed=run.seed,
            precision=row.precision,
            max_grad_norm=row.max_norm,
            log_every=max(1, steps // 40),
        ),
        evaluation=EvaluationConfig(
            every=max(1, steps // size.evaluations), sequences=size.sequences
        ),
        backend=BackendConfig(device=settings.device),
        output=OutputConfig(name="quality", tensorboard=False, progress=False),
    )


def build(row: Row, model: nn.Module, *, lr: float, seed: int) -> torch.optim.Optimizer:
    """The row's optimizer over a model."""
    named = list(model.named_parameters())
    match row.optimizer:
        case "adamw":
            return torch.optim.AdamW(named, lr=lr, **row.options)
        case "muon":
            return muon(model, (m.weight for m in _ends(model)), lr=lr, **row.options)
        case "adamw8":
            return adamw8(model, lr=lr, **row.options)
        case "galore":
            return galore(model, (m.weight for m in _ends(model)), lr=lr, **row.options)
        case "lion":
            return importlib.import_module("lion_pytorch").Lion(
                model.parameters(), lr=lr, **row.options
            )
        case "adafactor":
            return torch.optim.Adafactor(named, lr=lr, **row.options)
        case "paper":
            return Flora.paper(groups_of(row, model), lr, seed=seed, **row.options)
        case _:
            # Rows without bits are the momentum's rule alone, in float32.
            options = {"state_dtype": "float32", **row.options}
            return Flora(groups_of(row, model), lr, seed=seed, **options)


def gradients_of(row: Row) -> GradientsConfig:
    """Dense, or as sketches: on one process, what "compressed" computes in every layout."""
    if row.gradient_rank is None:
        return GradientsConfig()
    return GradientsConfig(level="compressed", rank=row.gradient_rank, bits=row.gradient_bits)


def gradient_bytes(model: nn.Module, sketched: GradientReport | None) -> int:
    """What is held from one micro-batch to the next."""
    rows = () if sketched is None else sketched.rows
    names = {row.name for row in rows if row.is_sketched}
    dense = sum(p.numel() * p.itemsize for n, p in model.named_parameters() if n not in names)
    return dense + sum(row.held_bytes for row in rows)


def groups_of(row: Row, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: parameters of equal settings together."""
    ends = {id(module.weight) for module in _ends(model)}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        options: dict[str, Any] = {}
        if parameter.ndim >= 2:
            options |= row.matrices
            if row.whole_rows is not None:
                options |= whole_rows(row, parameter)
        if id(parameter) in ends:
            options |= row.ends
        group = groups.setdefault(repr(options), {"params": [], **options})
        group["params"].append((name, parameter))
    return list(groups.values())


def _ends(model: nn.Module) -> list[Any]:
    both = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    return [module for module in both if module is not None]


def whole_rows(row: Row, parameter: nn.Parameter) -> Mapping[str, Any]:
    """block="full" for one matrix, at the row's ratio.

    On a side that is no power of two hadamard cannot: `flora` goes gaussian there, `blend`, which
    needs hadamard, keeps its blocks.
    """
    assert row.whole_rows is not None
    side = min(parameter.shape[0], parameter.numel() // parameter.shape[0])
    full = {"block": "full", "rank": max(1, side // row.whole_rows)}
    if row.options.get("sketch") != "hadamard" or side.bit_count() == 1:
        return full
    if row.options["momentum"] == "blend":
        return {"block": CENTRE["block"], "rank": CENTRE["block"] // row.whole_rows}
    return full | {"sketch": "gaussian"}
