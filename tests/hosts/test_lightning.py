# SPDX-License-Identifier: Apache-2.0
"""Lightning with Flora from ``configure_optimizers``: one process, DDP, and FSDP2 by its strategy.

Lightning's DeepSpeedStrategy asks for CUDA before anything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as lightning
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

import flora_dist.lightning
from flora_dist import Flora
from tests.conftest import launched_pool_of
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
    distance,
    whole_weights,
)
from tests.hosts.trainer_runs import SKETCHES, by_hand

pytestmark = pytest.mark.deepspeed
Case = tuple[str, bool]
"""A mode, and whether gradients are sketched."""
CASES: list[Case] = [("plain", False), ("plain", True), ("fsdp2", True)]
OTHERS: list[Case] = [("ddp", False), ("ddp", True), ("fsdp2", False)]


class Module(lightning.LightningModule):
    """A user's module; everything of Flora's is what ``configure_optimizers`` returns."""

    def __init__(self, mode: str, *, is_blank: bool = False) -> None:
        super().__init__()
        self.model, self.mode = blank() if is_blank else build(), mode

    def configure_model(self) -> None:
        if self.mode == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Flora:
        return Flora(self.model.named_parameters(), lr=LR, weight_decay=DECAY, **SETTINGS)


def loader(mode: str) -> DataLoader[Any]:
    """This rank's samples; all of them are one step's."""
    rank, ranks = (0, 1) if mode == "plain" else (dist.get_rank(), dist.get_world_size())
    own = range(rank * SAMPLES // ranks, (rank + 1) * SAMPLES // ranks)
    return DataLoader(Subset(Samples(), own), batch_size=len(own))


def fit(case: Case, steps: int, resume: str | None = None) -> tuple[Any, Any]:
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    mode, sketched = case
    strategy: Any = {
        "plain": "auto",
        "ddp": "ddp",
        "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }[mode]
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1 if mode == "plain" else 2,
        strategy=strategy,
        max_epochs=steps,
        gradient_clip_val=MAX_NORM,
        callbacks=[flora_dist.lightning.SketchedGradients(**SKETCHES)] if sketched else [],
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module(mode, is_blank=resume is not None)
    trainer.fit(module, loader(mode), ckpt_path=resume)
    return trainer, module


def trained_and_resumed(case: Case, folder: str) -> tuple[dict[str, Tensor], bool]:
    trainer, _ = fit(case, STEPS // 2)
    path = f"{folder}/half.ckpt"
    trainer.save_checkpoint(path)
    _, resumed = fit(case, STEPS, path)
    _, whole = fit(case, STEPS)
    weights, again = whole_weights(whole.model), whole_weights(resumed.model)
    return weights, all(torch.equal(again[name], value) for name, value in weights.items())


def all_cases(cases: list[Case], folder: str) -> dict[Case, Any]:
    with patch.dict(os.environ):  # Lightning sets LOCAL_RANK and more for good
        return {case: trained_and_resumed(case, f"{folder}/{case[0]}-{case[1]}") for case in cases}


def on_processes(cases: list[Case], folder: Path) -> dict[Case, Any]:
    several = [case for case in cases if case[0] != "plain"]
    single = [case for case in cases if case[0] == "plain"]
    return {
        **launched_pool_of(2)(all_cases, several, str(folder))[0],
        **all_cases(single, str(folder)),
    }


def assert_plain_loops_and_resumed(runs: dict[Case, Any]) -> None:
    for (mode, is_sketched), (weights, is_equal) in runs.items():
        sketches = SKETCHES if is_sketched else None
        expected = by_hand(kept=set(), sketches=sketches).weights
        assert distance(weights, expected) < 1e-5, (mode, is_sketched)
        assert is_equal, (mode, is_sketched)


def test_lightning_trains_the_plain_loop_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert_plain_loops_and_resumed(on_processes(CASES, tmp_path))


@pytest.fixture(autouse=True)
def _no_variables_left() -> Iterator[None]:
    with patch.dict(os.environ):
        yield


@pytest.mark.slow
def test_lightning_does_so_on_every_other_layout(tmp_path: Path) -> None:
    assert_plain_loops_and_resumed(on_processes(OTHERS, tmp_path))


@pytest.mark.parametrize("stage", ["stage_2", "stage_3", "stage_2_offload"])
def test_lightning_refuses_deepspeed_without_a_gpu(stage: str) -> None:
    trainer = quick_trainer(strategy=f"deepspeed_{stage}")
    with pytest.raises(RuntimeError, match="only supported on CUDA GPUs"):
        trainer.fit(Module("plain"), loader("plain"))


# ---- the callback, on one process


def quick_trainer(**given: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **given,
    )


def sketches() -> Any:
    return flora_dist.lightning.SketchedGradients("compressed")


def test_lightnings_clipping_of_sketches_is_refused_by_its_own_option() -> None:
    class Attached(Module):
        def on_fit_start(self) -> None:
            flora_dist.attach(self.model, self.trainer.optimizers[0], "compressed")

    trainer = quick_trainer(gradient_clip_val=MAX_NORM)
    with pytest.raises(RuntimeError, match=r"gradient_clip_val by flora_dist\.lightning"):
        trainer.fit(Attached("plain"), loader("plain"))


def test_clipping_by_value_of_sketches_is_refused_by_its_own_option() -> None:
    by_value = {"gradient_clip_val": MAX_NORM, "gradient_clip_algorithm": "value"}
    module = Module("plain")
    with pytest.raises(ValueError, match=r"gradient_clip_algorithm is 'value'.*or none"):
        quick_trainer(callbacks=[sketches()], **by_value).fit(module, loader("plain"))
    quick_trainer(**by_value).fit(module, loader("plain"))  # nothing was attached


def test_a_module_that_clips_itself_goes_on_doing_so() -> None:
    clipped = []

    class Clipping(Module):
        def configure_gradient_clipping(self, optimizer: Flora, *_: Any, **__: Any) -> None:
            clipped.append(float(optimizer.clip_grad_norm_(MAX_NORM)))

    module = Clipping("plain")
    quick_trainer(callbacks=[sketches()]).fit(module, loader("plain"))
    assert len(clipped) == 1


def test_a_module_has_its_own_clipping_again_after_the_fit() -> None:
    module = Module("plain")
    trainer = quick_trainer(callbacks=[sketches()], gradient_clip_val=MAX_NORM)
    trainer.fit(module, loader("plain"))
    assert "configure_gradient_clipping" not in vars(module)


def test_a_second_fit_of_a_module_has_all_its_gradients() -> None:
    again = Module("plain")
    quick_trainer(callbacks=[sketches()]).fit(again, loader("plain"))
    fresh = Module("plain")
    fresh.load_state_dict(again.state_dict())
    for module in (again, fresh):
        quick_trainer(callbacks=[sketches()]).fit(module, loader("plain"))
    found = dict(again.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in fresh.named_parameters())


def test_another_optimizer_than_flora_has_no_sketches() -> None:
    class Adam(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(ValueError, match=r"those of one Flora; .* returned AdamW"):
        quick_trainer(callbacks=[sketches()]).fit(Adam("plain"), loader("plain"))


def test_a_level_that_there_is_not_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="gradients must be one of"):
        flora_dist.lightning.SketchedGradients("thin")
