# SPDX-License-Identifier: Apache-2.0
"""What each process does in the tests of the deepspeed backend: many engines, one launch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import flora_dist.deepspeed
from flora_dist import Flora
from flora_dist.trainer.arrange import arranged
from flora_dist.trainer.backend import find_world
from flora_dist.trainer.checkpoint import Checkpoints, Start, find_start, load
from flora_dist.trainer.config import CheckpointConfig, Config
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.data import Order, read_corpus
from flora_dist.trainer.engine import build_learner, check_learner
from flora_dist.trainer.gradients import totals
from flora_dist.trainer.interrupt import StopRequest
from flora_dist.trainer.loop import TrainingRun, accumulate, train
from flora_dist.trainer.metrics import Metrics
from flora_dist.trainer.model import read_model_config
from flora_dist.trainer.new_network import new_network
from flora_dist.trainer.preflight import check_run
from flora_dist.trainer.progress import Silence
from flora_dist.trainer.replicated import Learner, World
from flora_dist.trainer.tokenizer import ByteTokenizer
from tests.trainer.ragged import micro_batches, token_count
from tests.trainer.support import TINY, tensor_hashes


def _learner(config: Config, world: World) -> tuple[torch.nn.Module, Learner]:
    check_learner(config, world)
    network = read_model_config(config.model, ByteTokenizer(), config.data.sequence_length)
    built, parts = new_network(config, network, world, print)
    model = arranged(built, config.model)
    return model, build_learner(model, config.optimizer, config, world, parts)


def trained(overrides: list[str]) -> dict[str, Any]:
    """Train the tests' tiny.yaml; its records, what was measured, and Flora's own count of state.

    Not `run`: that opens and closes the process group, which the processes of a launch keep.
    """
    config = load_config(TINY, overrides)
    world = find_world(config.backend)
    _, learner = _learner(config, world)
    measured = train(_training_run(config, world, learner), **_quietly())
    optimizer = learner.optimizer
    reported = optimizer.report().state_bytes if isinstance(optimizer, Flora) else None
    learner.spread.close()
    return {**asdict(measured), "reported": reported}


def saved_and_resumed(overrides: list[str], folder: str) -> list[tuple[list[Any], dict[str, str]]]:
    """Train whole, then from the second step on; records, and hashes of weights and state."""
    config = load_config(TINY, overrides)
    world = find_world(config.backend)
    identity = check_run(config, world).identity
    saving = CheckpointConfig(every=2, keep=None)
    found, start = [], Start()
    for name in ("whole", "resumed"):
        _, learner = _learner(config, world)
        if start.path is not None:
            load(learner, start.path)
        place = Path(folder) / name
        with Checkpoints(
            place, saving, learner, identity, start, steps=config.train.steps
        ) as checkpoints:
            measured = train(
                _training_run(config, world, learner),
                **_quietly(),
                start=start.position,
                checkpoints=checkpoints,
            )
        learner.spread.close()
        found.append((measured.records, tensor_hashes(place / "step-00000006")))
        resume = str(Path(folder) / "whole" / "step-00000002")
        start = find_start(CheckpointConfig(resume=resume), place, identity, world)
    return found


def _training_run(config: Config, world: World, learner: Learner) -> TrainingRun:
    corpus = read_corpus(config.data, ByteTokenizer())
    return TrainingRun(
        config=config,
        world=world,
        corpus=corpus,
        order=Order(sequences=len(corpus.train), global_batch=config.train.global_batch, seed=0),
        spread=learner.spread,
        optimizer=learner.optimizer,
        scheduler=learner.scheduler,
        gradients=totals(learner.gradients, world.device),
    )


def _quietly() -> dict[str, Any]:
    return {
        "stop": StopRequest(),
        "metrics": Metrics(None, ()),
        "progress": Silence(),
    }


def gradient_norm(overrides: list[str]) -> float:
    """The norm that the engine finds of the ragged batch's gradient."""
    config = load_config(TINY, overrides)
    world = find_world(config.backend)
    _, learner = _learner(config, world)
    accumulate(learner.spread, micro_batches(world.process_rank, world.size), token_count(), world)
    learner.spread.update(learner.optimizer, learner.scheduler)
    norm = float(learner.spread.module.get_global_grad_norm())
    learner.spread.close()
    return norm


def steps_as_it_stands(path: str) -> tuple[list[float], str]:
    """Two steps of a small model from a JSON alone; the losses, and the class of the optimizer."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    engine, *_ = flora_dist.deepspeed.initialize(model=model, config=path)
    samples = json.loads(Path(path).read_text())["train_micro_batch_size_per_gpu"]
    inputs = torch.randn(samples, 64, dtype=torch.bfloat16)
    losses = []
    for _ in range(2):
        loss = engine(inputs).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    name = type(flora_dist.deepspeed.attach(engine)).__name__
    engine.destroy()
    return losses, name
