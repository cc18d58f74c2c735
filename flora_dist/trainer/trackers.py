# SPDX-License-Identifier: Apache-2.0
"""Who hears a run's records beside metrics.jsonl: TensorBoard, wandb, or a package's tracker."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol

from flora_dist.trainer.optional_imports import needs_train_extra

GROUP: Final = "flora_dist.trackers"
"""The entry point under which a package offers a tracker of its own."""
_WANDB: Final = "wandb"


class Tracker(Protocol):
    """What is asked of a tracker; only process 0 has one."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """What was measured at a step, by the names of metrics.jsonl; steps ascend."""

    def close(self) -> None:
        """The run has ended, also where it failed."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a tracker may know of the run whose records it gets."""

    name: str
    """`output.name`."""
    label: str
    """The optimizer; of the one beside it, with `, compare`."""
    folder: Path
    """The run's folder, which is there."""
    config: Mapping[str, Any]
    """The whole config, as plain values."""
    first_step: int
    """Steps that were taken before a resume; those behind it come again."""


Opener = Callable[[Tracked], Tracker]
"""What an entry point names: it opens the tracker of one run."""


def find_tracker(name: str) -> Opener:
    """The tracker of that name, before anything is written.

    Raises:
        ValueError: nobody offers it, its package is missing, or wandb has no login.
    """
    if name == _WANDB:
        return _find_wandb()
    offered = {each.name: each for each in entry_points(group=GROUP)}
    if name not in offered:
        raise ValueError(
            f"output.tracker must be wandb or what an installed package offers as {GROUP}; "
            f"{name!r} is neither ({', '.join(sorted(offered)) or 'none'} offered). Correct the "
            "name, or install that package."
        )
    opener: Opener = offered[name].load()
    return opener


def find_tensorboard() -> Opener:
    """TensorBoard, below `tensorboard/` of the run's folder.

    Raises:
        ValueError: it is not installed.
    """
    with needs_train_extra():
        import torch.utils.tensorboard  # noqa: F401 - the first thing that misses the package
    return _Board


@contextmanager
def open_trackers(openers: Sequence[Opener], run: Tracked) -> Iterator[list[Tracker]]:
    """Open them, and close them all at the end."""
    with ExitStack() as stack:
        trackers = []
        for opener in openers:
            tracker = opener(run)
            stack.callback(tracker.close)
            trackers.append(tracker)
        yield trackers


class _Board:
    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard" / run.label
        self._writer = SummaryWriter(str(folder), purge_step=run.first_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _find_wandb() -> Opener:
    if importlib.util.find_spec(_WANDB) is None:
        raise ValueError(
            "output.tracker='wandb' needs the package 'wandb', which is not installed. Run: pip "
            'install "flora-dist[train,wandb]"'
        )
    import wandb

    if wandb.setup().settings.mode == "online":  # else nobody has to be known
        with _plain_words():
            wandb.login(prompt=False)
    return _Wandb


class _Wandb:
    """A run of wandb's; its own variables (WANDB_PROJECT, WANDB_MODE, ...) go before these."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        with _plain_words():
            self._run = wandb.init(
                project="flora_dist",
                group=run.name,
                name=f"{run.name}, {run.label}",
                dir=run.folder,
                config=dict(run.config),
            )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _plain_words() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise ValueError(
            f"output.tracker='wandb' must be able to start; it says: {' '.join(str(error).split())}"
            " Log in with `wandb login`, or keep its files here: WANDB_MODE=offline."
        ) from error
