# SPDX-License-Identifier: Apache-2.0
"""Everything about a run that can be checked before a process group or a file exists."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_dist.trainer.arrange import arranged
from flora_dist.trainer.backend import check_world
from flora_dist.trainer.checkpoint import Start, find_start
from flora_dist.trainer.config import AUTO, DENSE, Config, OptimizerConfig
from flora_dist.trainer.corpus_cache import open_corpus
from flora_dist.trainer.data import Corpus, Order
from flora_dist.trainer.engine import check_learner
from flora_dist.trainer.gradients import check_sizes
from flora_dist.trainer.model import read_model_config, shapes_only, vocabulary_in_file
from flora_dist.trainer.optimizers import build_optimizer
from flora_dist.trainer.replicated import World
from flora_dist.trainer.summary import RESULTS
from flora_dist.trainer.tokenizer import Tokenizer, open_tokenizer
from flora_dist.trainer.trackers import Opener, find_tensorboard, find_tracker
from flora_dist.trainer.trained import CHECKPOINTS
from flora_dist.trainer.utf8 import read_utf8

RESOLVED = "config.yaml"
"""Every run folder has it; only a folder with it is ever replaced."""


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
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
    vocabulary_in_file: int | None
    """What the model's own file says of it; None where that is not replaced."""
    tokenizer: Tokenizer
    """The tokenizer."""
    identity: dict[str, Any]
    """What a checkpoint must share with this run."""
    start: Start
    """Where it begins."""
    trackers: tuple[Opener, ...]
    """Who hears its records."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return folder_of(self.config)

    @property
    def keeps_folder(self) -> bool:
        """Whether the run goes on in a folder that is there, and removes nothing of it."""
        resume = self.config.checkpoint.resume
        if resume is None or resume == AUTO:
            return resume == AUTO
        return self.folder.resolve() in Path(resume).resolve().parents

    @property
    def is_done(self) -> bool:
        """Whether the same command has come to its end before, with everything written."""
        results, config = _results(self.folder), self.config
        wanted = ["measured"] if config.compare is None else ["measured", "adamw"]
        return (
            config.checkpoint.resume == AUTO
            and self.start.position.step == config.train.steps
            and all((results.get(part) or {}).get("finished") for part in wanted)
        )


def folder_of(config: Config) -> Path:
    """Where a run writes."""
    return Path(config.output.folder) / config.output.name


def checkpoint_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / CHECKPOINTS


def check_run(config: Config, world: World) -> CheckedRun:
    """Check a run.

    Raises:
        ValueError: the config does not fit the corpus, the model, the processes, the checkpoint or
            the run folder.
    """
    check_world(config, world.size)
    check_learner(config, world)
    tokenizer = open_tokenizer(config.data.tokenizer)
    network = read_model_config(config.model, tokenizer, config.data.sequence_length)
    corpus = open_corpus(config.data, tokenizer)
    order = Order(
        sequences=len(corpus.train),
        global_batch=config.train.global_batch,
        seed=config.train.seed,
    )
    for optimizer in filter(None, (config.optimizer, config.compare)):
        # On weights without memory: what the optimizer refuses, it refuses here.
        shapes = arranged(shapes_only(network), config.model).named_parameters()
        check_sizes(config, build_optimizer(optimizer, shapes, seed=config.train.seed))
    identity = _identity(config, network, corpus)
    folder = folder_of(config)
    checked = CheckedRun(
        config=config,
        world=world,
        corpus=corpus,
        order=order,
        network=network,
        vocabulary_in_file=vocabulary_in_file(config.model),
        tokenizer=tokenizer,
        identity=identity,
        start=find_start(config.checkpoint, checkpoint_folder(folder), identity, world),
        trackers=_trackers(config, world),
    )
    _check_length(checked)
    _check_folder(checked)
    return checked


def _trackers(config: Config, world: World) -> tuple[Opener, ...]:
    """Process 0 alone tells them: the others need no package of theirs."""
    if not world.speaks:
        return ()
    board = (find_tensorboard(),) if config.output.tensorboard else ()
    named = config.output.tracker
    return board if named is None else (*board, find_tracker(named))


def _identity(config: Config, network: Any, corpus: Corpus) -> dict[str, Any]:
    """What a run and the one it resumes must share: not the processes, nor how they are used."""
    facts = {
        "model": {k: v for k, v in network.to_dict().items() if k != "transformers_version"},
        "seed": config.train.seed,
        "optimizer": config.optimizer.name,
        # A checkpoint brings its own: others in the config would go unheard.
        "options": _options(config.optimizer),
        # Levels of sketches may change in a resumed run; to or from dense is another algorithm.
        "gradients": DENSE if config.gradients.level == DENSE else "sketched",
        "corpus": corpus.fingerprint,
        "sequence_length": config.data.sequence_length,
        "global_batch": config.train.global_batch,
    }
    tree: dict[str, Any] = json.loads(json.dumps(facts))  # as a manifest gives it back
    return tree


def _options(optimizer: OptimizerConfig) -> dict[str, Any]:
    ours = {} if optimizer.decay == "matrices" else {"decay": optimizer.decay}
    return {**optimizer.options, **ours}


def _check_length(checked: CheckedRun) -> None:
    done, steps = checked.start.position.step, checked.config.train.steps
    # With auto, a run that was killed behind its last step has its comparison or summary to do.
    if done > steps or (done == steps and checked.config.checkpoint.resume != AUTO):
        raise ValueError(
            f"train.steps must be above the checkpoint's step; it is {steps}, the checkpoint was "
            f"written after {done}. Raise train.steps."
        )


def _check_reachable(folder: Path) -> None:
    """Refuse a folder that cannot be made."""
    place = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not place.is_dir():
        raise ValueError(
            f"a run's folder must be inside folders; '{place}', of '{folder}', is none. Change "
            "output.folder or output.name."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"a run's folder must be writable; '{place}', where '{folder}' belongs, is not. "
            "Change output.folder."
        )


def _check_folder(checked: CheckedRun) -> None:
    folder, resume = checked.folder, checked.config.checkpoint.resume
    if checked.world.speaks:
        _check_reachable(folder)
    is_continued = checked.keeps_folder and checked.start.path is not None
    if is_continued or not folder.exists():
        return
    overwrite = checked.config.output.overwrite
    if resume != AUTO and not overwrite:
        raise ValueError(
            f"a run must not overwrite another; {str(folder)!r} exists. Change output.name, set "
            "output.overwrite: true, or go on with it: checkpoint.resume: auto."
        )
    if any(folder.iterdir()) and not (folder / RESOLVED).is_file():
        raise ValueError(
            f"only the folder of a run can be replaced or continued; {str(folder)!r} has no "
            f"{RESOLVED}, so something else wrote it. Change output.name."
        )
    steps = (_results(folder).get("measured") or {}).get("steps")
    if not overwrite and steps:
        raise ValueError(
            "checkpoint.resume: auto starts over only a run that left no results; "
            f"{str(folder)!r} has the results of {steps} steps and no checkpoint. Change "
            "output.name, or set output.overwrite: true."
        )


def _results(folder: Path) -> dict[str, Any]:
    """What a run in that folder has written at its end; empty without one."""
    path = folder / RESULTS
    tree = json.loads(read_utf8(path)) if path.is_file() else {}
    return tree if isinstance(tree, dict) else {}
