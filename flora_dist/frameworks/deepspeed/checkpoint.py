# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of DeepSpeed engines in canonical form: any stage and number of ranks to any other.

The optimizer's masters and states are saved as on any layout; this adds what an engine knows beside
them (frozen parameters, buffers, counters, scheduler, loss scale) and, after loading, brings the
model's own copies of the weights up to date. Private names of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from flora_dist.checkpoint.agreement import agreed
from flora_dist.checkpoint.boxes import Boxes
from flora_dist.checkpoint.contents import ModelTensor, gather, others_of
from flora_dist.checkpoint.convert.engine_facts import ENGINE, EngineFacts, facts_in, scale_of
from flora_dist.checkpoint.fitting import FittedFlora, fit
from flora_dist.checkpoint.folder import Json, Manifest
from flora_dist.checkpoint.json_values import check_like, from_json, to_json
from flora_dist.checkpoint.loading import Loaded, read
from flora_dist.checkpoint.saving import write
from flora_dist.checkpoint.target import target_of
from flora_dist.core.layouts.flat import cut_each
from flora_dist.core.sketch.keys import canonical_name
from flora_dist.core.state.spec import matrix_sizes
from flora_dist.core.tiles import tiles_of_span
from flora_dist.flora import Flora
from flora_dist.frameworks.deepspeed.attach import attach
from flora_dist.frameworks.deepspeed.config import TESTED


def save_checkpoint(
    engine: DeepSpeedEngine,
    folder: str | Path,
    tag: str | None = None,
    *,
    extra: Mapping[str, Json] | None = None,
    keep: int | None = None,
) -> Path:
    """Save an engine so that any stage, number of ranks or other framework can go on from it.

    Every rank calls it, after ``engine.step()`` of the last micro-batch. Saved are fp32 weights,
    frozen parameters, buffers, Flora's state, the engine's counters, its scheduler's state and the
    loss scale; not the position in the data.

    Args:
        engine: with Flora as its optimizer.
        folder: of the run's checkpoints, on storage that every rank sees.
        tag: the checkpoint's name; None: by the steps done, "step-00000010".
        extra: numbers, words, lists and tables of the caller's own; all but "deepspeed".
        keep: checkpoints to keep, this one among them; None: all.

    Returns:
        The checkpoint's path.

    Raises:
        TypeError: the engine's optimizer is not Flora.
        ValueError: between the micro-batches of a step; a scheduler with state that is no number; a
            tag, or a disk, that cannot be written to. Older checkpoints stand.
    """
    flora = attach(engine)
    with agreed():
        _check_between_steps(engine, "saved")
        target = target_of(folder, step=engine.global_steps, extra=extra, keep=keep, tag=tag)
        if ENGINE in target.extra:
            raise ValueError(
                f"extra must leave the name {ENGINE!r} to the engine; it uses that name. Rename "
                "yours."
            )
        own = {**target.extra, ENGINE: _facts_of(engine).as_json()}
        contents = gather(flora, _others_of(engine, flora))
    return write(contents, replace(target, extra=own))


def load_checkpoint(engine: DeepSpeedEngine, path: str | Path) -> Loaded:
    """Load what ``save_checkpoint`` of any engine, or ``flora_dist.checkpoint.save``, has written.

    Every rank calls it, between steps. At the same stage and number of ranks the run goes on bit
    for bit. A checkpoint that no engine wrote has no state of a scheduler: the engine's is left as
    it is, with a warning.

    Args:
        engine: with Flora as its optimizer, of the seed of the run that saved.
        path: a checkpoint, or the folder of several: then the newest.

    Returns:
        The checkpoint's path, the steps done, and the ``extra`` it was saved with.

    Raises:
        TypeError: the engine's optimizer is not Flora.
        ValueError: on every rank, naming file and field: a file that is torn or changed, another
            model, seed or scheduler. The running state is as it was then.
    """
    flora = attach(engine)
    with agreed():
        _check_between_steps(engine, "loaded")
        _check_names(engine.optimizer)
    loaded = read(Path(path), lambda manifest: _fit(manifest, engine, flora))
    flora.check_consistency()
    return replace(loaded, extra={k: v for k, v in loaded.extra.items() if k != ENGINE})


# ---- what cannot be saved or loaded


def _check_between_steps(engine: DeepSpeedEngine, done: str) -> None:
    """Refuse to cut a step in two, and an engine with state of other kinds."""
    since, cycle = int(engine.micro_steps), int(engine.gradient_accumulation_steps())
    manual = engine._is_gradient_accumulation_boundary
    if since % cycle if manual is None else not manual:
        raise ValueError(
            f"an engine must be {done} between steps, since gradients of micro-batches are not "
            f"saved; its micro_steps is {since}, its gradient_accumulation_steps {cycle}. Call "
            "this after the engine.step() that completes them."
        )
    for name, is_on in (
        ("random layer-token drop", engine.random_ltd_enabled()),
        ("curriculum learning's data sampler", engine.curriculum_learning_enabled()),
    ):
        if is_on:
            raise ValueError(
                f"{name} has state that only DeepSpeed's own checkpoints hold; the config turns "
                f"it on. Use engine.{'save' if done == 'saved' else 'load'}_checkpoint."
            )


def _check_names(optimizer: Any) -> None:
    """Before anything has changed: the names by which weights are brought up to date."""
    if isinstance(optimizer, Flora | FP16_UnfusedOptimizer):
        return
    names: tuple[str, ...] = ("update_lp_params",)
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        names = (
            "checkpoint_event_prologue",
            "checkpoint_event_epilogue",
            "_reassign_or_swap_out_partitioned_parameters",
        )
    for name in names:
        if not hasattr(optimizer, name):
            raise RuntimeError(
                f"{type(optimizer).__name__} must have {name!r}, as in DeepSpeed {TESTED}. Use "
                "that version, or engine.load_checkpoint."
            )


# ---- what the optimizer does not hold


def _others_of(engine: DeepSpeedEngine, flora: Flora) -> Iterator[ModelTensor]:
    """Frozen parameters, under stage 3 this rank's partitions of them, and buffers."""
    named = ((canonical_name(name), p) for name, p in engine.module.named_parameters())
    partitioned = {name: p for name, p in named if hasattr(p, "ds_tensor")}
    for held in others_of(engine.module, flora):
        parameter = partitioned.get(held.name)
        yield held if parameter is None else _partition_of(held.name, parameter)


def _partition_of(name: str, parameter: Any) -> ModelTensor:
    shape, group = tuple(parameter.ds_shape), parameter.ds_process_group
    sizes, world_size = [parameter.partition_numel()], dist.get_world_size(group)
    (span,) = cut_each([(name, shape)], sizes=sizes, world_size=world_size)
    start, stop = span.owned[dist.get_rank(group)]
    _, rows, columns = matrix_sizes(shape)
    return ModelTensor(
        name=name,
        shape=shape,
        tiles=tiles_of_span(start, stop, num_rows=rows, num_columns=columns),
        local=parameter.ds_tensor.detach().view(-1)[: stop - start],
    )


# ---- what the engine knows


def _facts_of(engine: DeepSpeedEngine) -> EngineFacts:
    scheduler = engine.lr_scheduler
    return EngineFacts(
        global_samples=int(engine.global_samples),
        skipped_steps=int(engine.skipped_steps),
        scheduler=None
        if scheduler is None
        else to_json(scheduler.state_dict(), f"the state of {type(scheduler).__name__}"),
        loss_scale=scale_of(vars(_scaler(engine))),
    )


def _scaler(engine: DeepSpeedEngine) -> Any:
    """What holds the loss scale: an object without one, where nothing is scaled."""
    optimizer = engine.optimizer
    name = "loss_scale_config" if type(optimizer) is FP16_UnfusedOptimizer else "loss_scaler"
    return getattr(optimizer, name, _NoScaler())


class _NoScaler:
    """Of an optimizer that never scales a loss."""


# ---- loading


@dataclass(frozen=True, eq=False, kw_only=True)
class _FittedEngine:
    """A checkpoint read beside the running state of an engine."""

    engine: DeepSpeedEngine
    flora: FittedFlora
    step: int
    facts: EngineFacts | None
    """None: no engine wrote it."""
    scheduler: dict[str, Any] | None
    """What the engine's scheduler loads."""

    @property
    def tensors(self) -> dict[str, Boxes]:
        return self.flora.tensors

    @torch.no_grad()
    def put_in_place(self) -> None:
        optimizer, engine = self.engine.optimizer, self.engine
        if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
            # Small parameters stay whole between steps; what is partitioned is read anew.
            optimizer.checkpoint_event_prologue()
            self.flora.put_in_place()
            _refresh_stage_3(optimizer)
            optimizer.checkpoint_event_epilogue()
        else:
            self.flora.put_in_place()
            _refresh(optimizer)
        facts = self.facts
        engine.global_steps = self.step
        # Counts micro-batches of this engine's cycles, which may be others than the writer's.
        engine.micro_steps = self.step * engine.gradient_accumulation_steps()
        engine.global_samples = self.step * engine.train_batch_size()
        engine.skipped_steps = 0
        if facts is not None:
            engine.global_samples, engine.skipped_steps = facts.global_samples, facts.skipped_steps
            vars(_scaler(engine)).update(facts.loss_scale_for(vars(_scaler(engine))))
        if self.scheduler is not None:
            engine.lr_scheduler.load_state_dict(self.scheduler)


def _fit(manifest: Manifest, engine: DeepSpeedEngine, flora: Flora) -> _FittedEngine:
    facts = facts_in(manifest)
    return _FittedEngine(
        engine=engine,
        flora=fit(manifest, flora, _others_of(engine, flora)),
        step=manifest.step,
        facts=facts,
        scheduler=_scheduler_state(engine, None if facts is None else facts.scheduler),
    )


def _scheduler_state(engine: DeepSpeedEngine, saved: Json) -> dict[str, Any] | None:
    """What the engine's scheduler is to load; nothing where only one of the two has one."""
    scheduler = engine.lr_scheduler
    if (scheduler is None) != (saved is None):
        lacking, remedy = (
            ("the engine", "the learning rate stays as loaded")
            if scheduler is None
            else ("the checkpoint", "load the scheduler's state yourself")
        )
        warnings.warn(
            f"a learning rate scheduler goes on if both engine and checkpoint have one; {lacking} "
            f"has none: {remedy}.",
            stacklevel=2,
        )
    if scheduler is None or not isinstance(saved, dict):
        return None
    now = scheduler.state_dict()
    if now.keys() != saved.keys():
        raise ValueError(
            f"the scheduler must be the one that was saved, with state {sorted(saved)}; "
            f"{type(scheduler).__name__} has {sorted(now)}. Configure the scheduler as the run "
            "that saved it."
        )
    check_like(saved, now, f"the state of {type(scheduler).__name__}")
    return {name: from_json(saved[name], value) for name, value in now.items()}


def _refresh(optimizer: Any) -> None:
    """Bring the model's weights up to date with the fp32 ones that were loaded."""
    if isinstance(optimizer, Flora):  # steps the model's own
        return
    if type(optimizer) is FP16_UnfusedOptimizer:
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for parameters, copies in groups:
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
    else:
        optimizer.update_lp_params()


def _refresh_stage_3(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
