# SPDX-License-Identifier: Apache-2.0
"""Engines that accelerate and the Hugging Face Trainer built, attached afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_dist.deepspeed
from flora_dist import Flora
from tests.conftest import launched_pool_of
from tests.zero.small import PARAMS, SAMPLES, batch, build, config_of, counts, start, train, weights

pytest.importorskip("accelerate", reason="accelerate is not installed (extra: dev)")
pytestmark = pytest.mark.deepspeed


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """As ``accelerate launch --use_deepspeed`` starts a process; forgotten at the end."""
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        AcceleratorState._reset_state(reset_partial_state=True)


def prepared_by_accelerate(stage: int) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    model = build()
    plugin = DeepSpeedPlugin(hf_ds_config=_config(stage), zero3_init_flag=False)
    with fresh_accelerate():
        accelerator = Accelerator(deepspeed_plugin=plugin)
        optimizer = Flora(model.named_parameters(), **PARAMS)
        engine, wrapped = accelerator.prepare(model, optimizer)
        assert flora_dist.deepspeed.attach(engine) is optimizer
        plain, _ = start(config_of(stage))
        train(plain, range(3))
        train_by(accelerator, engine, wrapped)
        assert counts(optimizer) == {3}
        found = weights(engine)
        assert all(torch.equal(found[name], weight) for name, weight in weights(plain).items())


def train_by(accelerator: Any, engine: Any, optimizer: Any) -> None:
    for step in range(3):
        accelerator.backward(engine(batch(step)))
        optimizer.step()
        optimizer.zero_grad()


def _config(stage: int) -> dict[str, Any]:
    """Without an optimizer block, which accelerate refuses beside an optimizer object."""
    config = config_of(stage)
    del config["optimizer"]
    return {**config, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_of_accelerate_trains_once_it_is_attached(stage: int) -> None:
    launched_pool_of(2)(prepared_by_accelerate, stage)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples as the Trainer wants them."""

    def __init__(self) -> None:
        self.x = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x_NI": self.x[index]}


def trained_by_the_trainer(stage: int, folder: str) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    attached: list[Flora] = []

    class Attach(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            attached.append(flora_dist.deepspeed.attach(trainer.model_wrapped))

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def forward(self, x_NI: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.model(x_NI)}

    with fresh_accelerate():
        arguments = TrainingArguments(
            output_dir=folder,
            deepspeed=_config(stage),
            per_device_train_batch_size=SAMPLES,
            max_steps=3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=Loss(),
            args=arguments,
            train_dataset=Rows(),
            optimizer_cls_and_kwargs=(Flora, PARAMS),
            callbacks=[Attach()],
        )
        trainer.train()
        assert counts(attached[0]) == {3}
        assert "model.up.weight" in {row.name for row in attached[0].report().rows}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_hugging_face_trainer_trains_with_attach_in_a_callback(
    stage: int, tmp_path: Path
) -> None:
    launched_pool_of(2)(trained_by_the_trainer, stage, str(tmp_path))
