# SPDX-License-Identifier: Apache-2.0
"""Lightning with Flora from ``configure_optimizers``: one process, DDP, and FSDP2 by its strategy.

Lightning's DeepSpeedStrategy asks for CUDA before anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

import flora_dist
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
    build,
    distance,
    whole_weights,
)
from tests.hosts.trainer_runs import SKETCHES, by_hand

lightning = pytest.importorskip(
    "lightning.pytorch", reason="lightning is not installed (extra: hosts)"
)
pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
Case = tuple[str, bool]
"""A mode, and whether gradients are sketched."""
CASES: list[Case] = [(mode, kept) for mode in ("plain", "ddp", "fsdp2") for kept in (False, True)]


class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
    """A user's module; everything of Flora's is what ``configure_optimizers`` returns."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.model, self.mode = build(), mode

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


class Sketched(Module):
    """The same with sketched gradients: two hooks more."""

    def on_fit_start(self) -> None:
        model = self.model if self.mode == "fsdp2" else self.trainer.strategy.model
        flora_dist.attach(model, self.trainer.optimizers[0], **SKETCHES)

    def configure_gradient_clipping(
        self, optimizer: Flora, gradient_clip_val: float, **_: Any
    ) -> None:
        optimizer.clip_grad_norm_(gradient_clip_val)


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
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = (Sketched if sketched else Module)(mode)
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
    return {case: trained_and_resumed(case, f"{folder}/{case[0]}-{case[1]}") for case in cases}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Any]:
    folder = str(tmp_path_factory.mktemp("lightning"))
    several = [case for case in CASES if case[0] != "plain"]
    single = [case for case in CASES if case[0] == "plain"]
    return {**launched_pool_of(2)(all_cases, several, folder)[0], **all_cases(single, folder)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{'-sketched' * case[1]}")
def test_lightning_trains_the_plain_loop_and_resumes_bit_for_bit(
    case: Case, runs: dict[Case, Any]
) -> None:
    weights, is_equal = runs[case]
    sketches = SKETCHES if case[1] else None
    assert distance(weights, by_hand(kept=set(), sketches=sketches).weights) < 1e-5
    assert is_equal


def test_lightnings_clipping_of_sketches_is_refused_by_its_own_option(tmp_path: Path) -> None:
    class Unclipped(Sketched):
        configure_gradient_clipping = Module.configure_gradient_clipping

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        gradient_clip_val=MAX_NORM,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(RuntimeError, match="gradient_clip_val"):
        trainer.fit(Unclipped("plain"), loader("plain"))
