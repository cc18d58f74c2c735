# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed writes about a run with Flora: monitors and log lines."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

import pytest
import torch.distributed as dist
from deepspeed.utils import logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import launched_pool_of
from tests.zero.small import PARAMS, config_of, start, train

pytestmark = pytest.mark.deepspeed


def monitored(stage: int, folder: str) -> None:
    engine, _ = start(
        config_of(
            stage,
            steps_per_print=1,
            csv_monitor={"enabled": True, "output_path": folder, "job_name": "csv"},
            tensorboard={"enabled": True, "output_path": folder, "job_name": "board"},
        )
    )
    train(engine, range(3))
    if dist.get_rank() == 0:
        engine.monitor.tb_monitor.summary_writer.close()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_monitors_write_lr_at_every_step(stage: int, tmp_path: Path) -> None:
    launched_pool_of(2)(monitored, stage, str(tmp_path))
    with (tmp_path / "csv" / "Train_Samples_lr.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert [float(lr) for _, lr in rows] == [PARAMS["lr"]] * 3
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.value for event in board.Scalars("Train/Samples/lr")] == pytest.approx(
        [PARAMS["lr"]] * 3
    )


def logged(stage: int) -> str:
    engine, _ = start(config_of(stage, steps_per_print=1))
    stream, level = io.StringIO(), logger.level
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(engine, range(2))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return stream.getvalue()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_log_says_step_and_lr(stage: int) -> None:
    first, second = launched_pool_of(2)(logged, stage)
    assert f"step=1, skipped=0, lr=[{PARAMS['lr']}]" in first
    assert f"step=2, skipped=0, lr=[{PARAMS['lr']}]" in first
    assert "step=" not in second
