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
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import flora_dist.transformers
from flora_dist import Flora
from flora_dist.frameworks.inside import unwrapped
from tests.conftest import launched_pool_of
from tests.hosts.small import (
    DECAY,
    LR,
    MAX_NORM,
    MODES,
    SAMPLES,
    SETTINGS,
    STEPS,
    Samples,
    blank,
    build,
    distance,
    host_of,
    is_zero,
    whole_weights,
    zero_config,
)
from tests.hosts.trainer_runs import SKETCHES, by_hand


class SketchedSFT(flora_dist.transformers.SketchedGradients, trl.SFTTrainer):
    """As docs/hosts/transformers.md has it."""


def trainer_of(kind: Any, folder: Path, mode: str = "plain", saves: int = 0, **given: Any) -> Any:
    """``saves``: steps between checkpoints; 0: none."""
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
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="constant",
        logging_steps=1,
        per_device_train_batch_size=SAMPLES // ranks,
        report_to=[],
        save_strategy="steps" if saves else "no",
        save_steps=saves or 500,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        **modes,
    )
    data = Dataset.from_dict({"input_ids": Samples().tokens.tolist()})
    given = {"model": build(), **given}
    return kind(args=config, train_dataset=data, processing_class=tokenizer, **given)


def losses(trainer: Any, resume: Path | None = None) -> list[float]:
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
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
def test_sft_is_the_plain_loop_on_every_layout(tmp_path: Path) -> None:
    expected = by_hand().losses
    several = [mode for mode in MODES if mode != "plain"]
    runs = launched_pool_of(2)(in_modes, several, tmp_path)[0] | in_modes(["plain"], tmp_path)
    for mode, found in runs.items():
        assert found == pytest.approx(expected, rel=1e-6), mode


Case = tuple[str, bool]
"""A mode, and whether gradients are sketched."""


def resumed_in_modes(cases: list[Case], folder: Path) -> dict[Case, tuple[dict[str, Tensor], bool]]:
    """Weights at the end, and whether a run that was stopped half way has the bits of them."""
    found = {}
    for mode, is_sketched in cases:
        kind = SketchedSFT if is_sketched else trl.SFTTrainer
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": ASKED, "mode": mode}
        given |= SKETCHES if is_sketched else {}
        place = folder / f"{mode}-{is_sketched}"
        with host_of(mode):
            trainer = trainer_of(kind, place, saves=STEPS // 2, **given)
            losses(trainer)
            whole = whole_weights(trainer.model_wrapped)
        with host_of(mode):
            trainer = trainer_of(kind, place / "again", model=blank(), **given)
            losses(trainer, place / f"checkpoint-{STEPS // 2}")
            again = whole_weights(trainer.model_wrapped)
        found[mode, is_sketched] = whole, all(torch.equal(again[n], w) for n, w in whole.items())
    return found


@pytest.mark.slow
@pytest.mark.deepspeed
def test_sft_resumes_on_every_layout_with_dense_and_sketched_gradients(tmp_path: Path) -> None:
    expected = {False: by_hand().weights, True: by_hand(sketches=SKETCHES).weights}
    cases = [(mode, is_sketched) for mode in MODES for is_sketched in (False, True)]
    single = [case for case in cases if case[0] == "plain"]
    several = [case for case in cases if case[0] != "plain"]
    runs = launched_pool_of(2)(resumed_in_modes, several, tmp_path)[0]
    for case, (weights, is_equal) in (runs | resumed_in_modes(single, tmp_path)).items():
        assert is_equal, case
        assert distance(weights, expected[case[1]]) < 1e-5, case


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
