# SPDX-License-Identifier: Apache-2.0
"""One run from config to summary: check everything, then train, then say what came out."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flora_dist.flora import Flora
from flora_dist.trainer.arrange import arranged
from flora_dist.trainer.backend import find_world, process_group, wait_for_all
from flora_dist.trainer.checkpoint import Checkpoints, Start, check_same_start, resume
from flora_dist.trainer.config import CheckpointConfig, Config, OptimizerConfig
from flora_dist.trainer.configfile import as_tree, as_yaml
from flora_dist.trainer.engine import build_learner
from flora_dist.trainer.failure import EXIT_CODE, say
from flora_dist.trainer.gradients import totals
from flora_dist.trainer.hub import fetched
from flora_dist.trainer.interrupt import StopRequest
from flora_dist.trainer.loop import RunResult, TrainingRun, train
from flora_dist.trainer.metrics import open_metrics
from flora_dist.trainer.mfu import load_of_a_token
from flora_dist.trainer.model import parameter_count
from flora_dist.trainer.new_network import new_network
from flora_dist.trainer.optimizers import LABELS, schedule_factor
from flora_dist.trainer.optional_imports import needs_train_extra, stay_offline
from flora_dist.trainer.place import Rows
from flora_dist.trainer.preflight import RESOLVED, CheckedRun, check_run, checkpoint_folder
from flora_dist.trainer.progress import open_progress
from flora_dist.trainer.replicated import Learner
from flora_dist.trainer.summary import Summary, summary_table, write_summary
from flora_dist.trainer.trackers import Tracked
from flora_dist.trainer.trained import write_card

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn


def run(config: Config) -> int:
    """Train as the config says; the exit code: 0, also after SIGTERM, or 130 after Ctrl-C.

    1 where `train.stop_at_nan` has ended it.

    Raises:
        ValueError: the config does not fit the corpus, the model, the processes or the run folder,
            raised before anything is written; or a checkpoint is damaged.
        Failed: anything else went wrong with more than one process about.
    """
    world = find_world(config.backend)
    config = fetched(config)
    stay_offline()
    with needs_train_extra():
        from rich.console import Console
    console = Console() if world.speaks else None
    checked = check_run(config, world)
    if checked.is_done:
        if console is not None:
            console.print(f"{checked.folder} is finished: nothing is left to do", soft_wrap=True)
        return 0
    # Signals before there is a group end the process as ever: there is nothing to save, and one
    # that waits for the others in C++ would not hear of them.
    with process_group(config.backend, world), StopRequest() as stop:
        check_same_start(checked.start, world)
        if world.speaks:
            _prepare_folder(checked)
        is_finite = _train_and_tell(checked, stop, console)
        # torchrun ends the others as soon as one process ends: nobody leaves before the files.
        wait_for_all()
    return stop.exit_code if is_finite else EXIT_CODE


def _train_and_tell(checked: CheckedRun, stop: StopRequest, console: Console | None) -> bool:
    """Train, AdamW beside it if it is asked for, and write what came out; whether it is finite."""
    config = checked.config
    measured, parameters = _one(checked, config.optimizer, stop, console, compared=False)
    adamw = None
    if config.compare is not None and measured.finished:
        adamw, _ = _one(checked, config.compare, stop, console, compared=True)
    is_finite = all(each is None or each.not_finite is None for each in (measured, adamw))
    if console is None:
        return is_finite
    summary = Summary(
        run=config.output.name,
        optimizer=config.optimizer.name,
        lr=config.optimizer.options["lr"],
        adamw_lr=None if adamw is None or config.compare is None else config.compare.options["lr"],
        parameters=parameters,
        world_size=checked.world.size,
        measured=measured,
        adamw=adamw,
    )
    write_summary(summary, checked.folder)
    console.print(summary_table(summary))
    console.print(f"written to {checked.folder}", soft_wrap=True)
    return is_finite


def _prepare_folder(checked: CheckedRun) -> None:
    """Make the run's folder.

    Raises:
        ValueError: the file system refuses what it seemed to allow: it is full or read-only.
    """
    try:
        _make_folder(checked)
    except OSError as error:
        raise ValueError(
            f"a run's folder must be writable; '{checked.folder}' gave: {error.strerror}. Change "
            "output.folder."
        ) from error


def _make_folder(checked: CheckedRun) -> None:
    if checked.folder.exists() and not checked.keeps_folder:
        shutil.rmtree(checked.folder)
    checked.folder.mkdir(parents=True, exist_ok=True)
    (checked.folder / RESOLVED).write_text(as_yaml(checked.config), encoding="utf-8")
    write_card(checked.folder, checked.network, checked.tokenizer, checked.config.model.lora)


def _one(
    checked: CheckedRun,
    optimizer_config: OptimizerConfig,
    stop: StopRequest,
    console: Console | None,
    *,
    compared: bool,
) -> tuple[RunResult, int]:
    """Train one fresh model with one optimizer; its measurements and the model's size."""
    config, label = checked.config, LABELS[optimizer_config.name]
    built, rows = _new_network(checked, console)
    model = arranged(built, config.model)
    parameters = parameter_count(model)
    if console is not None and not compared:
        console.print(
            f"{parameters:,} parameters, "
            f"vocabulary {checked.network.vocab_size:,}{_instead(checked)}; "
            f"{len(checked.corpus.train.tokens):,} training tokens; "
            f"{checked.world.size} x {checked.world.device.type}, {config.backend.name}",
            soft_wrap=True,
        )
    load = load_of_a_token(model, checked.network, config, checked.world)
    learner = build_learner(model, optimizer_config, config, checked.world, rows)
    if console is not None:
        _warn(learner, config.train.steps, console)
    training = replace(_training_run(checked, learner, console), load=load)
    folder = checkpoint_folder(checked.folder)
    start = Start() if compared else _resumed(checked, learner, console)
    metrics_folder, tracked = _tracked(checked, label, start, compared=compared)
    shown = console if config.output.progress else None
    saving = CheckpointConfig() if compared else config.checkpoint
    with (
        open_metrics(metrics_folder, checked.trackers, tracked) as metrics,
        open_progress(shown, label, config.train.steps) as progress,
        Checkpoints(
            folder, saving, learner, checked.identity, start, steps=config.train.steps
        ) as checkpoints,
    ):
        measured = train(
            training,
            stop=stop,
            metrics=metrics,
            progress=progress,
            start=start.position,
            checkpoints=checkpoints,
        )
    if console is not None and measured.not_finite is not None:
        say(_not_finite(label, measured.not_finite, checkpoints.newest))
    elif console is not None and stop.agreed is not None:
        saved = checkpoints.of(measured.steps)
        console.print(_stopped(label, stop.agreed, measured.steps, saved), soft_wrap=True)
    learner.spread.close()
    return measured, parameters


def _new_network(checked: CheckedRun, console: Console | None) -> tuple[nn.Module, Rows | None]:
    def say_so(line: str) -> None:
        if console is not None:
            console.print(line, soft_wrap=True)

    return new_network(checked.config, checked.network, checked.world, say_so)


def _warn(learner: Learner, steps: int, console: Console) -> None:
    """Say what is known before the run about settings that will cost it."""
    if not isinstance(learner.optimizer, Flora):
        return
    for sentence in learner.optimizer.advice(steps=steps):
        console.print(f"warning: {sentence}", soft_wrap=True, style="yellow")


def _resumed(checked: CheckedRun, learner: Learner, console: Console | None) -> Start:
    """Put the run's start in place and say where it is."""
    config, folder = checked.config, checkpoint_folder(checked.folder)
    start = resume(
        learner, checked.start, config.checkpoint, folder, checked.identity, checked.world
    )
    if console is not None and start.path is not None:
        console.print(f"going on from {start.path}", soft_wrap=True)
        if start.steps not in {None, config.train.steps}:
            console.print(_stretched(config, start), soft_wrap=True)
    return start


def _instead(checked: CheckedRun) -> str:
    """A word where the tokenizer's vocabulary has replaced that of the model's file."""
    said = checked.vocabulary_in_file
    if said in {None, checked.network.vocab_size}:
        return ""
    return f" (the tokenizer's, in place of {said:,} in {checked.config.model.config})"


def _training_run(checked: CheckedRun, learner: Learner, console: Console | None) -> TrainingRun:
    gradients = totals(learner.gradients, checked.world.device)
    if console is not None and gradients is not None:
        console.print(
            f"gradients {gradients}: {gradients.held_bytes:,} bytes kept, "
            f"{gradients.sent_bytes:,} given to a step's collectives",
            soft_wrap=True,
        )
    return TrainingRun(
        config=checked.config,
        world=checked.world,
        corpus=checked.corpus,
        order=checked.order,
        spread=learner.spread,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
        gradients=gradients,
    )


def _stretched(config: Config, start: Start) -> str:
    """The line that says what another number of steps does to the learning rate."""
    before, now, step = start.steps or 0, config.train.steps, start.position.step
    factors = [schedule_factor(config.schedule, steps)(step) for steps in (before, now)]
    lr = config.optimizer.options["lr"]
    return (
        f"train.steps was {before:,} and is {now:,}: schedule {config.schedule.name} now ends at "
        f"step {now:,}; the next step has lr {lr * factors[1]:.3g}, which would have been "
        f"{lr * factors[0]:.3g}"
    )


def _stopped(label: str, reason: signal.Signals, steps: int, saved: Path | None) -> str:
    """The line that says what a signal has ended, and where that is."""
    if not steps:
        return f"{reason.name}: {label} stopped before its first step"
    line = f"{reason.name}: {label} stopped after step {steps}"
    if saved is None:
        return f"{line}; nothing of it is saved"
    return f"{line}; saved in {saved}, from where checkpoint.resume: auto goes on"


def _not_finite(label: str, fault: str, newest: Path | None) -> str:
    """The words for a run that has ended because of its numbers."""
    before = "None was saved before it." if newest is None else f"The last from before is {newest}."
    return (
        f"error: a run's numbers must stay finite; with {label}, {fault}. No checkpoint of it is "
        f"written. {before} Lower lr, set train.max_grad_norm, or train on regardless with "
        "train.stop_at_nan: false."
    )


def _tracked(
    checked: CheckedRun, label: str, start: Start, *, compared: bool
) -> tuple[Path | None, Tracked]:
    """The folder of metrics.jsonl on process 0, AdamW's below the run's; what trackers are told."""
    tracked = Tracked(
        name=checked.config.output.name,
        label=f"{label}, compare" if compared else label,
        folder=checked.folder,
        config=as_tree(checked.config),
        first_step=start.position.step,
    )
    if not checked.world.speaks:
        return None, tracked
    folder = checked.folder / "compare" if compared else checked.folder
    folder.mkdir(exist_ok=True)
    return folder, tracked
