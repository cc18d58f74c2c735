# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own checkpoints, at the world size that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from tests.conftest import launched_pool_of
from tests.zero.small import STAGES, build, config_of, counts, start, states, train, weights

pytestmark = pytest.mark.deepspeed
BF16 = {"bf16": {"enabled": True}}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 20}}


def contents(flora: Any) -> dict[str, dict[str, Any]]:
    """All state of this rank, as plain values."""
    return {
        name: {key: v.tolist() if torch.is_tensor(v) else v for key, v in own.items()}
        for name, own in states(flora)
    }


def resumed(stage: int, blocks: dict[str, Any], folder: str) -> None:
    config = config_of(stage, gradient_clipping=0.5, scheduler=SCHEDULER, **blocks)
    engine, flora = start(config)
    train(engine, range(4))  # a window and a step
    engine.save_checkpoint(folder, client_state={"seen": 4})
    saved = contents(flora)
    train(engine, range(4, 8))

    again, loaded = start(config, model=build(seed=7))
    _, client = again.load_checkpoint(folder)
    assert client["seen"] == 4
    assert contents(loaded) == saved
    assert counts(loaded) == {4}
    dtypes = {v.dtype for _, own in states(loaded) for v in own.values() if torch.is_tensor(v)}
    assert dtypes == {torch.float32}
    train(again, range(4, 8))
    assert again.optimizer.param_groups[0]["lr"] == engine.optimizer.param_groups[0]["lr"]
    assert contents(loaded) == contents(flora)
    found = weights(again)
    assert all(torch.equal(found[name], weight) for name, weight in weights(engine).items())


@pytest.mark.parametrize("blocks", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_run_goes_on_bit_for_bit(
    stage: int, blocks: dict[str, Any], tmp_path: Path
) -> None:
    launched_pool_of(2)(resumed, stage, blocks, str(tmp_path))


def other_seed(stage: int, folder: str) -> None:
    engine, _ = start(config_of(stage))
    train(engine, range(2))
    engine.save_checkpoint(folder)
    params = {**config_of(stage)["optimizer"]["params"], "seed": 1}
    other, _ = start(config_of(stage, optimizer={"type": "Flora", "params": params}))
    with pytest.raises(ValueError, match="must have the optimizer's seed"):
        other.load_checkpoint(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_another_seed_is_refused(stage: int, tmp_path: Path) -> None:
    launched_pool_of(2)(other_seed, stage, str(tmp_path))


def written(stage: int, folder: str) -> dict[str, Any]:
    engine, _ = start(config_of(stage))
    train(engine, range(3))
    engine.save_checkpoint(folder)
    return weights(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32_reads_the_weights(stage: int, tmp_path: Path) -> None:
    wanted, _ = launched_pool_of(2)(written, stage, str(tmp_path))
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def weights_only(stage: int, folder: str) -> None:
    engine, _ = start(config_of(stage))
    train(engine, range(2))
    engine.save_checkpoint(folder)
    again, flora = start(config_of(stage), model=build(seed=7))
    again.load_checkpoint(folder, load_optimizer_states=False)
    found = weights(again)
    assert all(torch.equal(found[name], weight) for name, weight in weights(engine).items())
    train(again, range(2))
    assert counts(flora) == {2}


@pytest.mark.parametrize("stage", STAGES)
def test_weights_alone_may_be_loaded_and_state_starts_anew(stage: int, tmp_path: Path) -> None:
    launched_pool_of(2)(weights_only, stage, str(tmp_path))
