# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer with Flora, with and without adapters of peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import flora_dist.transformers
from flora_dist import Flora
from flora_dist.frameworks.transformers.check import unwrapped
from tests.conftest import launched_pool_of
from tests.hosts.small import (
    LR,
    MODES,
    SAMPLES,
    SETTINGS,
    STEPS,
    Samples,
    build,
    host_of,
    is_zero,
    zero_config,
)
from tests.hosts.trainer_runs import SKETCHES


class SketchedSFT(flora_dist.transformers.SketchedGradients, trl.SFTTrainer):
    """As docs/hosts/transformers.md has it."""


def trainer_of(kind: Any, folder: Path, mode: str = "plain", **given: Any) -> Any:
    words = {"[UNK]": 0, "[EOS]": 1, "[PAD]": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        eos_token="[EOS]",
        pad_token="[PAD]",
    )
    ranks = 1 if mode == "plain" else dist.get_world_size()
    modes: dict[str, Any] = {}
    if is_zero(mode):
        modes["deepspeed"] = zero_config(mode)
    if mode == "fsdp2":
        modes = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": LAYER}}
    config = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        per_device_train_batch_size=SAMPLES // ranks,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        **modes,
    )
    data = Dataset.from_dict({"input_ids": Samples().tokens.tolist()})
    given = {"model": build(), **given}
    return kind(args=config, train_dataset=data, processing_class=tokenizer, **given)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


ASKED = flora_dist.transformers.flora(**SETTINGS)
LAYER = "LlamaDecoderLayer"


def test_sft_trains_with_flora(tmp_path: Path) -> None:
    with host_of("plain"):
        trainer = trainer_of(trl.SFTTrainer, tmp_path, optimizer_cls_and_kwargs=ASKED)
        found = losses(trainer)
        flora = unwrapped(trainer.optimizer)
    assert found[-1] < found[0]
    assert {row.name for row in flora.report().rows} == set(dict(build().named_parameters()))


def in_modes(modes: list[str], folder: Path) -> dict[str, list[float]]:
    found = {}
    for mode in modes:
        with host_of(mode):
            given = {"mode": mode, "optimizer_cls_and_kwargs": ASKED}
            trainer = trainer_of(trl.SFTTrainer, folder / mode, **given)
            found[mode] = losses(trainer)
            assert type(unwrapped(trainer.optimizer)) is Flora
    return found


@pytest.mark.slow
@pytest.mark.deepspeed
def test_sft_is_one_run_on_every_layout(tmp_path: Path) -> None:
    expected = in_modes(["plain"], tmp_path)["plain"]
    others = [mode for mode in MODES if mode != "plain"]
    for mode, found in launched_pool_of(2)(in_modes, others, tmp_path)[0].items():
        assert found == pytest.approx(expected, rel=1e-6), mode


def test_sft_trains_the_adapters_of_peft_alone(tmp_path: Path) -> None:
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with host_of("plain"):
        given = {"peft_config": adapters, "optimizer_cls_and_kwargs": ASKED}
        trainer = trainer_of(trl.SFTTrainer, tmp_path, **given)
        found = losses(trainer)
        flora = unwrapped(trainer.optimizer)
    assert found[-1] < found[0]
    assert all("lora_" in row.name for row in flora.report().rows)


def test_an_optimizer_built_before_peft_is_refused(tmp_path: Path) -> None:
    """It trained nothing: the weights did not move and nothing said so."""
    model = build()
    optimizer = Flora(model.named_parameters(), lr=LR, **SETTINGS)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with host_of("plain"):
        given = {"model": model, "peft_config": adapters, "optimizers": (optimizer, None)}
        trainer = trainer_of(trl.SFTTrainer, tmp_path, **given)
        with pytest.raises(ValueError, match=r"a first step must find a gradient.*adapters"):
            trainer.train()


def test_sft_trains_with_sketched_gradients(tmp_path: Path) -> None:
    with host_of("plain"):
        given = {"optimizer_cls_and_kwargs": ASKED, **SKETCHES}
        trainer = trainer_of(SketchedSFT, tmp_path, **given)
        found = losses(trainer)
        level = unwrapped(trainer.optimizer).gradients.level
    assert found[-1] < found[0]
    assert level == "compressed"
    assert all(torch.isfinite(torch.tensor(found)))
