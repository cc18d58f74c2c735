# SPDX-License-Identifier: Apache-2.0
"""The training loop: accumulate, step, log, evaluate, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from flora_dist.trainer.backend import largest_over_processes, sum_over_processes
from flora_dist.trainer.checkpoint import Checkpoints, Position
from flora_dist.trainer.config import Config
from flora_dist.trainer.data import IGNORED, Corpus, Order
from flora_dist.trainer.evaluate import validation_loss
from flora_dist.trainer.finite import Finite, tensors_in
from flora_dist.trainer.gradients import SketchTotals
from flora_dist.trainer.interrupt import StopRequest
from flora_dist.trainer.metrics import Metrics, Record
from flora_dist.trainer.model import sum_of_losses
from flora_dist.trainer.progress import Progress
from flora_dist.trainer.records import (
    Clock,
    Taken,
    peak_memory,
    training_record,
    validation_record,
)
from flora_dist.trainer.replicated import Spread, World
from flora_dist.trainer.traffic import Traffic

MicroBatch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and labels, both (sequences, length), int64, on the process's device."""

# The first steps differ from all others: lazy states, and DDP lays its buckets out anew in step 2.
_SETTLING_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Everything one optimizer's run works on."""

    config: Config
    """The whole config."""
    world: World
    """The processes."""
    corpus: Corpus
    """The text."""
    order: Order
    """Which sequences make which batch."""
    spread: Spread
    """The model over the processes."""
    optimizer: torch.optim.Optimizer
    """The optimizer."""
    scheduler: torch.optim.lr_scheduler.LambdaLR
    """Its learning rate."""
    gradients: SketchTotals | None
    """What of the gradients is kept as sketches; None: nothing."""
    load: float | None = None
    """Seconds that a token takes one device at its peak; None: not known."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one run measured; the same on every process but for `records`."""

    steps: int
    """Steps done, those before a resume included."""
    finished: bool
    """Whether it came to its last step, and all was finite."""
    not_finite: str | None
    """What was not, where `train.stop_at_nan` ended the run for it; None: nothing."""
    tokens: int
    """Labels it was trained on, those before a resume included."""
    loss: float | None
    """Training loss in nats per token, mean of the last ten records."""
    validation_loss: float | None
    """The last validation loss in nats per token."""
    tokens_per_second: float | None
    """Over all processes; without evaluation, checkpoints and the first steps."""
    peak_memory_bytes: int
    """What the process that had most had at most, weights and activations included."""
    weight_bytes: int
    """Weights, an engine's masters included, on the process that holds most."""
    state_bytes: int
    """Optimizer state on the process that holds most, measured on its tensors."""
    adamw_bytes: int
    """What AdamW's two float32 moments take for the weights that process holds."""
    bytes_sent: int | None
    """Bytes one process sends in one step; None before one was measured."""
    gradients: SketchTotals | None
    """What of the gradients was kept as sketches; None: nothing."""
    records: list[Record]
    """The lines of metrics.jsonl (process 0)."""


def accumulate(
    spread: Spread, micro_batches: Sequence[MicroBatch], tokens: int, world: World
) -> torch.Tensor:
    """Add the gradient of the mean loss over `tokens` labels; returns this process's sum of losses.

    `tokens` is the count over all micro-batches and processes. DDP and FSDP average gradients over
    the processes, so each sum is scaled by (processes / tokens): the result is the gradient of the
    token-weighted mean, exactly as one process gets it on the whole batch.
    """
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, (inputs, labels) in enumerate(micro_batches, start=1):
        with spread.synchronising(number == len(micro_batches)):
            with spread.arithmetic():
                loss = sum_of_losses(spread.module, inputs, labels)
            spread.backward(loss * (world.size / tokens))
        total += loss.detach()
    return total


def train(
    run: TrainingRun,
    *,
    stop: StopRequest,
    metrics: Metrics,
    progress: Progress,
    start: Position | None = None,
    checkpoints: Checkpoints | None = None,
) -> RunResult:
    """Run the steps from `start` (None: a fresh run) to the last or to a stop request.

    A run that is asked to stop is saved where it stops; one whose numbers are no longer finite ends
    there, and is not.
    """
    steps, position = run.config.train.steps, start or Position()
    finite = Finite(run.world, stops=run.config.train.stop_at_nan)
    first_step = position.step
    # What a step sends settles after the first ones; a shorter run measures its last step.
    measured_step = min(first_step + _SETTLING_STEPS, steps - 1)
    before = metrics.records[-1].get("seconds") if metrics.records else None
    clock, bytes_sent, unlogged = Clock(before or 0.0), None, None
    for step in range(first_step, steps):
        began = time.perf_counter()
        with Traffic() if step == measured_step else nullcontext() as traffic:
            # What is counted is the step alone: a norm would send messages of its own.
            has_norm = traffic is None and _due(step + 1, run.config.train.log_every, steps)
            taken = _take_step(run, step, stop, finite, has_norm=has_norm)
        if taken is None:
            break
        done, unlogged = taken.step, taken
        position = Position(step=done, tokens=position.tokens + taken.tokens)
        bytes_sent = traffic.bytes_sent if traffic is not None else bytes_sent
        clock.add(taken.tokens, time.perf_counter() - began, settled=step > measured_step)
        record: Record = {}
        if _due(done, run.config.train.log_every, steps):
            record, unlogged = _training_record(run, taken, clock), None
        if _due(done, run.config.evaluation.every, steps):
            record |= validation_record(_evaluate(run))
        if record:
            progress.update(done, record)
            _keep(metrics, finite, done, record | {"seconds": clock.seconds})
        if checkpoints is not None and finite.fault is None:
            checkpoints.save_if_due(position, finite, last_step=steps)
        if finite.fault is not None:
            break
    if unlogged is not None:  # stopped between two lines
        record = _training_record(run, unlogged, clock)
        _keep(metrics, finite, unlogged.step, record | {"seconds": clock.seconds})
    if checkpoints is not None and stop.agreed is not None and finite.fault is None:
        checkpoints.save(position, finite)
    return _result(run, position, clock, bytes_sent, metrics.records, finite.fault)


def _training_record(run: TrainingRun, taken: Taken, clock: Clock) -> Record:
    return training_record(taken, clock, run.world, steps=run.config.train.steps, load=run.load)


def _keep(metrics: Metrics, finite: Finite, step: int, record: Record) -> None:
    metrics.add({"step": step} | record)
    finite.see(step, record)


def _take_step(
    run: TrainingRun, step: int, stop: StopRequest, finite: Finite, *, has_norm: bool
) -> Taken | None:
    """One optimizer step on the global batch; None if the processes have agreed to stop before."""
    config = run.config.train
    batches = _micro_batches(run, step)
    tokens, stopping = _agree(batches, stop, finite, run.world)
    if stopping:
        return None
    torch.manual_seed(_dropout_seed(config.seed, step, run.world))
    losses = accumulate(run.spread, batches, tokens, run.world)
    finite.note(losses)
    lr = float(run.scheduler.get_last_lr()[0])
    late, norm = run.spread.norm_comes_late, None
    if has_norm and not late:
        norm = run.spread.norm(run.optimizer)
    run.spread.update(run.optimizer, run.scheduler)
    if has_norm and late:
        norm = run.spread.norm(run.optimizer)
    return Taken(step=step + 1, losses=losses, tokens=tokens, lr=lr, norm=norm)


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _micro_batches(run: TrainingRun, step: int) -> list[MicroBatch]:
    parts = run.order.micro_batches(
        step,
        micro_batch=run.config.train.micro_batch,
        process_rank=run.world.process_rank,
        world_size=run.world.size,
    )
    pairs = (run.corpus.train.batch(part) for part in parts)
    return [(inputs.to(run.world.device), labels.to(run.world.device)) for inputs, labels in pairs]


def _agree(
    batches: Sequence[MicroBatch], stop: StopRequest, finite: Finite, world: World
) -> tuple[int, bool]:
    """Labels that count in the global batch, and whether the processes stop before it.

    They do where any was asked to, or has seen losses in the step before that were not finite.
    """
    counted = sum(int((labels != IGNORED).sum()) for _, labels in batches)
    asked = [int(stop.asked is each) for each in (signal.SIGINT, signal.SIGTERM)]
    counts = torch.tensor([counted, *asked, 0], dtype=torch.int64, device=world.device)
    counts[-1] = finite.flag
    tokens, interrupted, preempted, broken = sum_over_processes(counts).tolist()
    stopping = stop.agree(interrupted=interrupted, preempted=preempted)
    return max(1, tokens), stopping or broken > 0


def _dropout_seed(seed: int, step: int, world: World) -> int:
    # Set anew each step, so that a resumed run draws what the uninterrupted one would have drawn.
    return (seed * 1_000_003 + step) * 65_537 + world.process_rank


def _evaluate(run: TrainingRun) -> float:
    return validation_loss(
        run.spread,
        run.corpus.validation,
        run.world,
        sequences=run.config.evaluation.sequences,
        micro_batch=run.config.train.micro_batch,
    )


def _result(
    run: TrainingRun,
    position: Position,
    clock: Clock,
    bytes_sent: int | None,
    records: list[Record],
    fault: str | None,
) -> RunResult:
    device = run.world.device
    losses = [value for record in records if (value := record.get("loss")) is not None][-10:]
    checks = [value for record in records if (value := record.get("validation_loss")) is not None]
    trained = sum(tensor.numel() for tensor in run.spread.trained())
    return RunResult(
        steps=position.step,
        finished=position.step == run.config.train.steps and fault is None,
        not_finite=fault,
        tokens=position.tokens,
        loss=sum(losses) / len(losses) if losses else None,
        validation_loss=checks[-1] if checks else None,
        tokens_per_second=clock.rate,
        peak_memory_bytes=largest_over_processes(peak_memory(device), device),
        weight_bytes=largest_over_processes(_held_bytes(run.spread.weights()), device),
        state_bytes=largest_over_processes(_held_bytes(run.optimizer.state.values()), device),
        adamw_bytes=largest_over_processes(8 * trained, device),
        bytes_sent=bytes_sent,
        gradients=run.gradients,
        records=records,
    )


def _held_bytes(values: Iterable[object]) -> int:
    """Bytes of the tensors among `values` that this process holds."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors_in(values))
