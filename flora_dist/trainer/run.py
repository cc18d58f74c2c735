# SPDX-License-Identifier: Apache-2.0
"""One run from config to summary: check everything, then train, then say what came out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_dist.trainer.backend import (
    check_world,
    find_world,
    process_group,
    wait_for_all,
)
from flora_dist.trainer.checkpoint import Checkpoints, check_checkpoint, load_checkpoint
from flora_dist.trainer.config import DENSE, Config, OptimizerConfig
from flora_dist.trainer.configfile import as_yaml
from flora_dist.trainer.data import Corpus, Order, read_corpus
from flora_dist.trainer.extras import needs_train_extra, stay_offline
from flora_dist.trainer.gradients import check_sizes, totals
from flora_dist.trainer.interrupt import EXIT_CODE, StopRequest
from flora_dist.trainer.learner import build_learner, check_learner
from flora_dist.trainer.loop import Job, Measured, checkpoint_folder, train
from flora_dist.trainer.metrics import open_metrics, open_progress
from flora_dist.trainer.model import build_model, parameter_count, read_model_config, shapes_only
from flora_dist.trainer.optimizers import LABELS, build_optimizer
from flora_dist.trainer.spread import World
from flora_dist.trainer.summary import Summary, summary_table, write_summary
from flora_dist.trainer.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

_RESOLVED = "config.yaml"  # every run folder has it; only a folder with it is ever replaced


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run whose every check has passed, and which has written nothing yet."""

    config: Config
    """The config."""
    world: World
    """The processes."""
    corpus: Corpus
    """The text, tokenized."""
    order: Order
    """The batches."""
    network: Any
    """The transformers config."""
    identity: dict[str, Any]
    """What a checkpoint must share with this run."""
    first_step: int
    """Steps done before: those of the checkpoint, else 0."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output.folder) / self.config.output.name

    @property
    def continues(self) -> bool:
        """Whether the run goes on in the folder of the run it resumes."""
        resume = self.config.checkpoint.resume
        return resume is not None and self.folder.resolve() in Path(resume).resolve().parents


def run(config: Config) -> int:
    """Train as the config says; returns the exit code: 0, or 130 after Ctrl-C.

    Raises:
        ValueError: the config does not fit the corpus, the model, the processes or the run folder;
            raised before anything is written.
    """
    stay_offline()
    with needs_train_extra():
        from rich.console import Console
    world = find_world(config.backend)
    console = Console() if world.speaks else None
    with StopRequest() as stop:
        plan = _plan(config, world)
        with process_group(config.backend, world):
            if world.speaks:
                _prepare_folder(plan)
            measured, parameters = _one(plan, config.optimizer, stop, console, compared=False)
            adamw = None
            if config.compare is not None and measured.finished:
                adamw, _ = _one(plan, config.compare, stop, console, compared=True)
            if console is not None:
                summary = Summary(
                    run=config.output.name,
                    optimizer=config.optimizer.name,
                    parameters=parameters,
                    world_size=world.size,
                    measured=measured,
                    adamw=adamw,
                )
                write_summary(summary, plan.folder)
                console.print(summary_table(summary))
                console.print(f"written to {plan.folder}", soft_wrap=True)
            # torchrun ends the others as soon as one process ends: nobody leaves before the files.
            wait_for_all()
    return EXIT_CODE if not (adamw or measured).finished else 0


def _plan(config: Config, world: World) -> Plan:
    """Check everything that can be checked before a process group or a file exists."""
    check_world(config, world.size)
    check_learner(config, world)
    tokenizer = open_tokenizer(config.data.tokenizer)
    network = read_model_config(config.model, tokenizer, config.data.sequence_length)
    corpus = read_corpus(config.data, tokenizer)
    order = Order(
        sequences=len(corpus.train),
        global_batch=config.train.global_batch,
        seed=config.train.seed,
    )
    identity = {
        "model": {k: v for k, v in network.to_dict().items() if k != "transformers_version"},
        "seed": config.train.seed,
        "optimizer": config.optimizer.name,
        # How sketches come about may change; that they are none is another algorithm.
        "gradients": DENSE if config.gradients.level == DENSE else "sketched",
        "corpus": corpus.fingerprint,
        "sequence_length": config.data.sequence_length,
        "global_batch": config.train.global_batch,
    }
    for optimizer in filter(None, (config.optimizer, config.compare)):
        # On weights without memory: what the optimizer refuses, it refuses here.
        shapes = shapes_only(network).named_parameters()
        check_sizes(config, build_optimizer(optimizer, shapes, seed=config.train.seed))
    resume = config.checkpoint.resume
    plan = Plan(
        config=config,
        world=world,
        corpus=corpus,
        order=order,
        network=network,
        identity=identity,
        first_step=0 if resume is None else check_checkpoint(Path(resume), identity),
    )
    if plan.first_step >= config.train.steps:
        raise ValueError(
            f"train.steps must be above the checkpoint's step; it is {config.train.steps}, the "
            f"checkpoint was written after {plan.first_step}. Raise train.steps."
        )
    _check_folder(plan)
    return plan


def _check_folder(plan: Plan) -> None:
    folder = plan.folder
    if plan.continues or not folder.exists():
        return
    if not plan.config.output.overwrite:
        raise ValueError(
            f"a run must not overwrite another; {str(folder)!r} exists. Change output.name, set "
            "output.overwrite: true, or resume it with checkpoint.resume."
        )
    if any(folder.iterdir()) and not (folder / _RESOLVED).is_file():
        raise ValueError(
            f"output.overwrite replaces only a run's folder; {str(folder)!r} has no {_RESOLVED}, "
            "so something else wrote it. Change output.name."
        )


def _prepare_folder(plan: Plan) -> None:
    if plan.folder.exists() and not plan.continues:
        shutil.rmtree(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / _RESOLVED).write_text(as_yaml(plan.config), encoding="utf-8")


def _one(
    plan: Plan,
    optimizer_config: OptimizerConfig,
    stop: StopRequest,
    console: Console | None,
    *,
    compared: bool,
) -> tuple[Measured, int]:
    """Train one fresh model with one optimizer; its measurements and the model's size."""
    config, label = plan.config, LABELS[optimizer_config.name]
    model = build_model(config.model, plan.network, seed=config.train.seed)
    parameters = parameter_count(model)
    if console is not None and not compared:
        console.print(
            f"{parameters:,} parameters, vocabulary {plan.network.vocab_size:,}; "
            f"{len(plan.corpus.train.tokens):,} training tokens; "
            f"{plan.world.size} x {plan.world.device.type}, {config.backend.name}",
            soft_wrap=True,
        )
    learner = build_learner(model, optimizer_config, config, plan.world)
    gradients = totals(learner.gradients, plan.world.device)
    if console is not None and gradients is not None:
        console.print(
            f"gradients {gradients}: {gradients.held_bytes:,} bytes kept, "
            f"{gradients.sent_bytes:,} given to a step's collectives",
            soft_wrap=True,
        )
    first_step = 0 if compared else plan.first_step
    if first_step:
        load_checkpoint(
            Path(config.checkpoint.resume or ""), model, learner.optimizer, learner.scheduler
        )
    job = Job(
        config=config,
        world=plan.world,
        corpus=plan.corpus,
        order=plan.order,
        spread=learner.spread,
        model=model,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
        gradients=gradients,
    )
    checkpoints = Checkpoints(
        folder=checkpoint_folder(plan.folder),
        every=None if compared else config.checkpoint.every,
        identity=plan.identity,
        world=plan.world,
    )
    metrics_folder, board = _metric_folders(plan, label, compared=compared)
    shown = console if config.output.progress else None
    with (
        open_metrics(metrics_folder, board, first_step=first_step) as metrics,
        open_progress(shown, label, config.train.steps) as progress,
    ):
        measured = train(
            job,
            first_step=first_step,
            stop=stop,
            metrics=metrics,
            progress=progress,
            checkpoints=checkpoints,
        )
    learner.spread.close()
    return measured, parameters


def _metric_folders(plan: Plan, label: str, *, compared: bool) -> tuple[Path | None, Path | None]:
    """Folders of metrics.jsonl and of TensorBoard on process 0; AdamW's lie below the run's."""
    if not plan.world.speaks:
        return None, None
    folder = plan.folder / "compare" if compared else plan.folder
    folder.mkdir(exist_ok=True)
    board = plan.folder / "tensorboard" / (f"{label}, compare" if compared else label)
    return folder, board if plan.config.output.tensorboard else None
