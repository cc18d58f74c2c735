# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own checkpoints, at the world size that wrote them; and ours, at any."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from tests.battery.test_layouts import FLOAT_MODEL, FLOAT_PARAMETER
from tests.conftest import launched_pool_of
from tests.harness.covering import by_default
from tests.zero import checkpoints, engines
from tests.zero.checkpoints import END, HALF
from tests.zero.engines import Run
from tests.zero.expected import distances_that_move
from tests.zero.small import STAGES, build, config_of, counts, start, states, train, weights

pytestmark = pytest.mark.deepspeed
BF16 = {"bf16": {"enabled": True}}
COMPRESSED = {"flora": {"gradients": "compressed"}}
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


BLOCKS = {"fp32": {}, "bf16": BF16, "compressed": COMPRESSED}


def _axes(stage: int, name: str) -> dict[str, Hashable]:
    return {"stage": stage, "bf16": name == "bf16", "compressed": name == "compressed"}


@pytest.mark.parametrize(("stage", "name"), by_default(product(STAGES, BLOCKS), _axes))
def test_a_loaded_run_goes_on_bit_for_bit(stage: int, name: str, tmp_path: Path) -> None:
    launched_pool_of(2)(resumed, stage, BLOCKS[name], str(tmp_path))


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


def written(stage: int, blocks: dict[str, Any], folder: str) -> dict[str, Any]:
    engine, _ = start(config_of(stage, **blocks))
    train(engine, range(3))
    engine.save_checkpoint(folder)
    return engines.masters(engine)


@pytest.mark.parametrize(
    ("stage", "blocks"),
    [
        *((stage, {}) for stage in (1, 2, 3)),
        *((stage, {**BF16, **COMPRESSED}) for stage in (1, 2, 3)),
    ],
)
def test_zero_to_fp32_reads_the_masters(stage: int, blocks: dict[str, Any], tmp_path: Path) -> None:
    wanted, _ = launched_pool_of(2)(written, stage, blocks, str(tmp_path))
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


# ---- checkpoints in the canonical form

# The scale doubles every second step.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}}
ACCUMULATED = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
SAME = {
    "0": (0, {}),
    "0 bf16": (0, BF16),
    "0 fp16": (0, FP16),
    "1 bf16, gradients in fp32": (1, ACCUMULATED),
    "1 fp16": (1, FP16),
    "2 bf16": (2, BF16),
    "2 compressed": (2, COMPRESSED),
    "2 offloaded": (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "2 round robin": (2, {"zero": {"round_robin_gradients": True}}),
    "3": (3, {"zero": {"sub_group_size": 500}}),
    "3 bf16": (3, BF16),
    "3 bf16, compressed, nothing whole": (
        3,
        {**BF16, **COMPRESSED, "zero": {"stage3_param_persistence_threshold": 0}},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_an_engine_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    launched_pool_of(2)(checkpoints.goes_on, *SAME[name], str(tmp_path))


# 0 in fp32 has no copies; partitions of stage 3 in fp32 are copies too.
@pytest.mark.parametrize(
    ("name", "step"), [("0 bf16", "_refresh"), ("2 bf16", "_refresh"), ("3", "_refresh_stage_3")]
)
def test_weights_that_are_not_brought_up_to_date_are_noticed(
    name: str, step: str, tmp_path: Path
) -> None:
    for said in launched_pool_of(2)(checkpoints.goes_wrong, *SAME[name], str(tmp_path), step):
        assert "assert differing(before, everything(again)) == []" in said


# Gradients of 2 and 3 ranks are summed in another order: the battery's tolerances, thrice as for
# engines against the reference; half the steps are the same run's.
MODEL, PARAMETER = 3 * FLOAT_MODEL, 3 * FLOAT_PARAMETER
MOVES = {
    "1 x3 to 3 x2": (Run(stage=1), 3, Run(stage=3), 2),
    "3 x2 to 2 x3": (Run(stage=3), 2, Run(stage=2), 3),
    "2 x3 to 0 x2, groups": (Run(stage=2, groups=True), 3, Run(stage=0, groups=True), 2),
}


@pytest.mark.parametrize("name", MOVES)
def test_any_stage_and_number_of_ranks_goes_on_from_any_other(name: str, tmp_path: Path) -> None:
    first, wrote, second, reads = MOVES[name]
    launched_pool_of(wrote)(checkpoints.trained, first, str(tmp_path), range(HALF), True)
    found, *_ = launched_pool_of(reads)(
        checkpoints.trained, second, str(tmp_path), range(HALF, END), False
    )
    wanted, *_ = launched_pool_of(reads)(
        checkpoints.trained, second, str(tmp_path), range(END), False
    )
    begin = {n: p.detach() for n, p in engines.build().named_parameters() if p.requires_grad}
    model, parameter = distances_that_move(begin, wanted, found)
    assert model < MODEL
    assert parameter < PARAMETER


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_not_cut_in_two(stage: int, tmp_path: Path) -> None:
    launched_pool_of(2)(checkpoints.between_micro_batches, stage, str(tmp_path))


def test_what_cannot_go_on_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    launched_pool_of(2)(checkpoints.refusals, str(tmp_path))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    launched_pool_of(2)(checkpoints.other_optimizer, str(tmp_path))


def test_an_engine_goes_on_from_a_plain_model(tmp_path: Path) -> None:
    launched_pool_of(2)(checkpoints.no_scheduler_saved, str(tmp_path))
