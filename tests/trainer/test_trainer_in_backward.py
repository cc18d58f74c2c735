# SPDX-License-Identifier: Apache-2.0
"""Runs that step in backward: the same losses as without, and what is refused before any file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flora_dist.trainer.config import Config
from flora_dist.trainer.engine import check_learner
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from tests.trainer.support import metrics

Tiny = Callable[..., Config]
FLORA = "optimizer={name: flora, lr: 1e-2, rank: 8}"
IN_BACKWARD = "train.step_in_backward=true"
ONE_MICRO_BATCH = "train.micro_batch=8"
SKETCHED = "gradients={level: compressed, bits: 4}"


@pytest.mark.parametrize(
    "overrides",
    [(ONE_MICRO_BATCH, "backend.name=fsdp2"), (SKETCHED,)],
    ids=["dense under fsdp2", "sketches of four micro-batches"],
)
def test_a_run_that_steps_in_backward_has_the_losses_of_one_that_does_not(
    overrides: tuple[str, ...], tiny: Tiny, tmp_path: Path
) -> None:
    common = (FLORA, "train.steps=3", "evaluation.every=3", *overrides)
    assert run(tiny(*common, "output.name=after")) == 0
    assert run(tiny(*common, "output.name=within", IN_BACKWARD)) == 0
    after, within = (metrics(tmp_path / name) for name in ("after", "within"))
    for ours, theirs in zip(within, after, strict=True):
        for key in ("loss", "validation_loss"):
            assert ours.get(key) == theirs.get(key)
    assert "gradient_norm" not in within[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer={name: adamw, lr: 1e-3}"], "needs Flora"),
        ([FLORA, ONE_MICRO_BATCH, "backend.name=ddp"], "complete after it.*fsdp2 with dense"),
        ([FLORA, "gradients.level=fused"], "complete after it"),
        ([FLORA, ONE_MICRO_BATCH, "train.max_grad_norm=1.0"], "before their norm is known"),
        ([FLORA], r"global_batch=8 is not.*processes = 2.*gradients\.level: compressed"),
    ],
)
def test_what_cannot_step_in_backward_is_refused(
    overrides: list[str], message: str, tiny: Tiny
) -> None:
    alone = World(process_rank=0, size=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        check_learner(tiny(*overrides, IN_BACKWARD), alone)
