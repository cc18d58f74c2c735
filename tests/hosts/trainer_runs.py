# SPDX-License-Identifier: Apache-2.0
"""Training by the Hugging Face Trainer in one process of several, and by a loop of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainingArguments

import flora_dist.transformers
from flora_dist import Flora
from flora_dist.frameworks.inside import unwrapped
from tests.hosts.small import (
    DECAY,
    LR,
    MAX_NORM,
    SAMPLES,
    SETTINGS,
    STEPS,
    Samples,
    blank,
    build,
    host_of,
    is_zero,
    whole_weights,
    zero_config,
)

NO_DECAY = {name for name, _ in build().named_parameters() if "norm" in name}
"""As the Trainer groups its parameters."""
SKETCHES: dict[str, Any] = {"gradients": "compressed", "gradient_rank": 8}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run ends with, on every rank."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    names: set[str]
    """Of parameters, as the optimizer's report has them."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a user asks for Flora."""

    given: dict[str, Any] = field(default_factory=dict)
    """Arguments of the Trainer."""
    options: dict[str, Any] = field(default_factory=dict)
    """TrainingArguments."""
    blocks: dict[str, Any] = field(default_factory=dict)
    """Of DeepSpeed's config."""
    kind: type[Trainer] = Trainer
    builds: bool = False
    """Whether the script builds the optimizer and passes ``optimizers=``."""

    def of(self, model: Any) -> dict[str, Any]:
        """The Trainer's arguments for a model."""
        if not self.builds:
            return self.given
        flora = Flora(model.named_parameters(), lr=LR, weight_decay=DECAY, **SETTINGS)
        return {**self.given, "optimizers": (flora, None)}


def by_argument() -> Way:
    return Way(given={"optimizer_cls_and_kwargs": flora_dist.transformers.flora(**SETTINGS)})


def by_word() -> Way:
    words = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
    return Way(options={"optim": "flora", "optim_args": words})


def by_json() -> Way:
    auto = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    return Way(blocks={"optimizer": {"type": "Flora", "params": {**auto, **SETTINGS}}})


def by_object() -> Way:
    return Way(builds=True)


def sketched(way: Way) -> Way:
    """The same with a Trainer that keeps sketches."""
    given = {**way.given, **SKETCHES}
    return replace(way, given=given, kind=flora_dist.transformers.FloraTrainer)


WAYS = {
    "argument": by_argument,
    "word": by_word,
    "json": by_json,
    "object": by_object,
    "sketched": lambda: sketched(by_argument()),
    "word-sketched": lambda: sketched(by_word()),
    "json-sketched": lambda: sketched(by_json()),
    "object-sketched": lambda: sketched(by_object()),
}


def arguments(mode: str, way: Way, folder: str, **options: Any) -> TrainingArguments:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    modes: dict[str, Any] = {}
    if is_zero(mode):
        modes["deepspeed"] = zero_config(mode, **way.blocks)
    if mode == "fsdp2":
        modes |= {
            "fsdp": True,
            "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
        }
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=SAMPLES // ranks,
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_only_model=False,
        **{"max_steps": STEPS, "save_strategy": "no", **modes, **way.options, **options},
    )


def trained(mode: str, way: str, folder: str, resume: str = "", **options: Any) -> Ran:
    """A run of the Trainer; ``resume``: a checkpoint's folder."""
    with host_of(mode):
        asked, model = WAYS[way](), blank() if resume else build()
        trainer = asked.kind(
            model=model,
            args=arguments(mode, asked, folder, **options),
            train_dataset=Samples(),
            **asked.of(model),
        )
        trainer.train(resume_from_checkpoint=resume or None)
        flora = unwrapped(trainer.optimizer)
        assert type(flora) is Flora
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return Ran(
            losses=[entry["loss"] for entry in logs],
            norms=[float(entry["grad_norm"]) for entry in logs],
            weights=whole_weights(trainer.model_wrapped),
            names={row.name for row in flora.report().rows},
        )


def resumed(mode: str, way: str, folder: str) -> tuple[Ran, bool]:
    """A run, and whether one that was stopped half way ends with its bits."""
    half = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole = trained(mode, way, folder, **half)
    again = trained(mode, way, f"{folder}-2", str(Path(folder) / f"checkpoint-{STEPS // 2}"))
    assert len(again.losses) == STEPS - STEPS // 2 or len(again.losses) == STEPS
    return whole, all(torch.equal(again.weights[n], w) for n, w in whole.weights.items())


def by_hand(*, kept: set[str] = NO_DECAY, sketches: dict[str, Any] | None = None) -> Ran:
    """The same training in a plain loop; ``kept``: what does not decay."""
    model = build()
    named = list(model.named_parameters())
    groups = [
        {"params": [pair for pair in named if pair[0] not in kept], "weight_decay": DECAY},
        {"params": [pair for pair in named if pair[0] in kept]},
    ]
    optimizer = Flora([group for group in groups if group["params"]], lr=LR, **SETTINGS)
    if sketches:
        flora_dist.attach(model, optimizer, **sketches)
    tokens = Samples().tokens
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(float(optimizer.clip_grad_norm_(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Ran(losses=losses, norms=norms, weights=whole_weights(model), names=set())
