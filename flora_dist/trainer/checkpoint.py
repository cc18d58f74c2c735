# SPDX-License-Identifier: Apache-2.0
"""When a run saves itself, what it goes on from, and what that must share with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from flora_dist import checkpoint
from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.api import forget_groups
from flora_dist.trainer.backend import largest_over_processes
from flora_dist.trainer.config import AUTO, CheckpointConfig
from flora_dist.trainer.failure import has_lost_peers
from flora_dist.trainer.fallback import damage_of, left_in, older
from flora_dist.trainer.finite import Finite
from flora_dist.trainer.replicated import Learner, World
from flora_dist.trainer.storage import Pending


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Labels they were taken on."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins: at its beginning, or from a checkpoint."""

    path: Path | None = None
    """The checkpoint."""
    position: Position = field(default_factory=Position)
    """How far it is."""
    steps: int | None = None
    """How long the run that saved it was to be; None: it did not say."""


class Checkpoints:
    """Saves one run; on leaving, the last checkpoint is waited for."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        learner: Learner,
        identity: Mapping[str, Any],
        start: Start,
        *,
        steps: int,
    ) -> None:
        """`steps`: how long the run is to be, which its schedule follows."""
        self._folder, self._config, self._learner = folder, config, learner
        self._identity, self._steps = identity, steps
        self._saved, self._saved_step = start.path, start.position.step
        self._pending: Pending | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self._wait()
            forget_groups()
        elif not has_lost_peers(error):
            # The others wait for this process in a message of the loop; their saves go on.
            with suppress(Exception):
                self._wait()

    def save_if_due(self, position: Position, finite: Finite, *, last_step: int) -> None:
        """Save every so many steps, and after the last one."""
        every, step = self._config.every, position.step
        if every is not None and (step % every == 0 or step == last_step):
            self.save(position, finite)

    def save(self, position: Position, finite: Finite) -> None:
        """Save now, where the run saves at all and has taken a step since the last time.

        Only finite numbers are saved: `finite` tells.
        """
        if self._config.every is None or position.step == self._saved_step:
            return
        held = [*self._learner.spread.trained(), *self._learner.optimizer.state.values()]
        if not finite.allow_save(position.step, held):
            return
        scheduler = self._learner.scheduler.state_dict()
        self._pending = self._learner.storage.save(
            self._folder,
            step=position.step,
            extra={
                "tokens": position.tokens,
                "steps": self._steps,
                "identity": dict(self._identity),
                # Its functions come from the config.
                "schedule": {k: v for k, v in scheduler.items() if k != "lr_lambdas"},
            },
            keep=self._config.keep,
        )
        self._saved, self._saved_step = self._folder / folders.tag_of(position.step), position.step

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint, or the one the run went on from; None: there is none."""
        return self._saved

    def of(self, step: int) -> Path | None:
        """The checkpoint after that many steps, if it is the newest one."""
        return self._saved if step == self._saved_step else None

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()


def find_start(
    config: CheckpointConfig, folder: Path, identity: Mapping[str, Any], world: World
) -> Start:
    """What the run begins with, its manifest compared with this run; reads no tensors.

    `folder` holds the run's own checkpoints, for `auto`; `identity` is what a run that resumes must
    have in common, by name.

    Raises:
        ValueError: no checkpoint, a damaged one (with `auto`: and none before it that is whole), or
            one of another model, seed, optimizer or corpus.
    """
    if config.resume is None:
        return Start()
    with _warnings_of(world):
        if config.resume != AUTO:
            return _start_at(folders.resolve(Path(config.resume)), identity, config)
        try:
            path = checkpoint.latest(folder)
        except ValueError as error:
            return _fall_back(str(error), left_in(folder), folder, identity, config)
    return Start() if path is None else _start_at(path, identity, config)


def resume(
    learner: Learner,
    start: Start,
    config: CheckpointConfig,
    folder: Path,
    identity: Mapping[str, Any],
    world: World,
) -> Start:
    """Put a run's start in place; with `auto`, where it is damaged, the whole one before it.

    Where the run begins after that, the same on every process, which must all call this.

    Raises:
        ValueError: on every process: no whole one, or another run's; nothing has changed then.
    """
    while start.path is not None:
        try:
            load(learner, start.path, lr=identity["options"]["lr"] if config.change_lr else None)
            return start
        except ValueError:
            damage = damage_of(start.path) if config.resume == AUTO else None
            if damage is None:
                raise
        with _warnings_of(world):
            before = older(folder, start.position.step)
            start = _fall_back(damage, before, folder, identity, config)
        check_same_start(start, world)
    return start


def _fall_back(
    damage: str,
    left: Iterator[Path],
    folder: Path,
    identity: Mapping[str, Any],
    config: CheckpointConfig,
) -> Start:
    """The newest of what is left of a run that has lost its newest checkpoint.

    Raises:
        ValueError: nothing is left, or it is another run's.
    """
    path = next(left, None)
    if path is None:
        raise ValueError(
            f"checkpoint.resume: auto goes on from a whole checkpoint, and '{folder}' has none to "
            f"fall back to: {damage} To start over, change output.name."
        )
    start = _start_at(path, identity, config)
    warnings.warn(f"{damage} Going on from the one before, '{path}'.", stacklevel=3)
    return start


@contextmanager
def _warnings_of(world: World) -> Iterator[None]:
    """Process 0 alone warns."""
    with warnings.catch_warnings():
        if not world.speaks:
            warnings.simplefilter("ignore")
        yield


def _start_at(path: Path, identity: Mapping[str, Any], config: CheckpointConfig) -> Start:
    manifest = folders.read_manifest(path)
    match manifest.facts.get("extra"):
        case {"identity": dict(theirs), "tokens": int(tokens), "schedule": dict(), **more}:
            ours, saved = dict(identity), theirs.get("options")
            if config.change_lr and isinstance(saved, dict):
                ours["options"] = {**ours["options"], "lr": saved.get("lr")}
            _compare(path, theirs, ours)
            position = Position(step=manifest.step, tokens=tokens)
            steps = more.get("steps")
            known = steps if isinstance(steps, int) else None
            return Start(path=path, position=position, steps=known)
    raise ValueError(
        f"checkpoint.resume must name what this trainer wrote; {str(path)!r} holds no run of the "
        "trainer. Name a checkpoint below <run>/checkpoints."
    )


def _compare(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        listed = "; ".join(_difference(name, theirs.get(name), ours[name]) for name in different)
        also = ", or take the new lr: checkpoint.change_lr: true" if "options.lr " in listed else ""
        raise ValueError(
            f"a checkpoint must come from the same run; {str(path)!r} differs: {listed}. Restore "
            f"the config it was written with, or start another run: change output.name{also}."
        )


def check_same_start(start: Start, world: World) -> None:
    """Refuse to train where processes have found different checkpoints.

    Raises:
        ValueError: they found different steps; on every process.
    """
    step = start.position.step
    highest = largest_over_processes(step, world.device)
    lowest = -largest_over_processes(-step, world.device)
    if highest != lowest:
        raise ValueError(
            "every process must find the same checkpoint; they found some after "
            f"{lowest} and some after {highest} steps. Put output.folder on storage that every "
            "machine sees."
        )


def load(learner: Learner, path: Path, *, lr: float | None = None) -> None:
    """Put a checkpoint's weights, optimizer state and schedule in place.

    `lr`: what the schedule's factors multiply from here on; None: what was saved.

    Raises:
        ValueError: on every process, naming file and field; nothing has changed then.
    """
    with warnings.catch_warnings():
        # DeepSpeed's part of a checkpoint has a schedule only if an engine wrote it; ours always.
        warnings.filterwarnings("ignore", message="a learning rate scheduler goes on if both")
        loaded = learner.storage.load(path)
    scheduler: LambdaLR = learner.scheduler
    state = dict(loaded.extra["schedule"])
    bases = state["base_lrs"] if lr is None else [lr] * len(state["base_lrs"])
    # Anew, since the curve is another one where the run's length is.
    factors = [factor(state["last_epoch"]) for factor in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(bases, factors, strict=True)]
    for group, base, rate in zip(scheduler.optimizer.param_groups, bases, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    functions = {"lr_lambdas": [None] * len(bases)}
    scheduler.load_state_dict(state | functions | {"base_lrs": bases, "_last_lr": rates})


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)]
        return ", ".join(f"{name}.{k} was {theirs.get(k)!r}, is {ours.get(k)!r}" for k in keys)
    return f"{name} was {theirs!r}, is {ours!r}"
