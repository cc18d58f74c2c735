# SPDX-License-Identifier: Apache-2.0
"""``initialize`` takes and gives what ``deepspeed.initialize`` does, on real engines."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

import flora_dist.deepspeed
from flora_dist import Flora
from tests.conftest import launched_pool_of
from tests.zero.small import (
    OUTPUTS,
    PARAMS,
    SAMPLES,
    STAGES,
    WIDTH,
    build,
    config_of,
    counts,
    start,
    states,
    train,
    weights,
)

pytestmark = pytest.mark.deepspeed
NAMES = {"up.weight", "up.bias", "down.weight", "down.bias"}


# ---- results


def four_things(stage: int) -> None:
    config = config_of(stage, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})
    before = copy.deepcopy(config)
    data = TensorDataset(torch.randn(16, WIDTH))
    model = build()
    results = flora_dist.deepspeed.initialize(model=model, config=config, training_data=data)
    engine, optimizer, loader, scheduler = results
    assert config == before
    assert type(engine) is DeepSpeedEngine
    assert engine.module is model
    assert optimizer is engine.optimizer
    assert isinstance(loader, DeepSpeedDataLoader)
    assert loader is engine.training_dataloader
    assert scheduler is engine.lr_scheduler
    for (x_NI,) in loader:
        assert x_NI.shape == (SAMPLES, WIDTH)
        engine.backward(engine(x_NI))
        engine.step()
    assert counts(flora_dist.deepspeed.attach(engine)) == {len(loader)}
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_results_are_engine_optimizer_loader_and_scheduler(stage: int) -> None:
    launched_pool_of(2)(four_things, stage)


def nothing_unasked() -> None:
    _, _, loader, scheduler = flora_dist.deepspeed.initialize(model=build(), config=config_of(2))
    assert loader is None
    assert scheduler is None


def test_loader_and_scheduler_are_none_where_not_asked_for() -> None:
    launched_pool_of(1)(nothing_unasked)


def from_a_path(path: str) -> None:
    engine, _ = start(None, args=Namespace(deepspeed_config=path))
    train(engine, range(1))
    other, _ = start(path)
    train(other, range(1))
    assert all(torch.equal(weights(engine)[n], w) for n, w in weights(other).items())


def test_a_path_in_args_is_a_path_in_config(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config_of(2)))
    launched_pool_of(2)(from_a_path, str(path))


# ---- schedulers


SCHEDULERS = {
    "WarmupLR": {"warmup_max_lr": 0.1, "warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_max_lr": 0.1, "warmup_num_steps": 2, "total_num_steps": 5},
    "WarmupCosineLR": {"warmup_num_steps": 2, "total_num_steps": 5},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 3},
}


def rates(engine: Any) -> list[float]:
    """The lr of each of five steps."""
    found = []
    for step in range(5):
        train(engine, range(step, step + 1))
        found.append(engine.optimizer.param_groups[0]["lr"])
    return found


def same_schedule(name: str) -> None:
    config = config_of(2, scheduler={"type": name, "params": SCHEDULERS[name]})
    ours, flora = start(config)
    adamw = {"type": "AdamW", "params": {"lr": PARAMS["lr"], "torch_adam": True}}
    theirs, *_ = deepspeed.initialize(model=build(), config={**config, "optimizer": adamw})
    found = rates(ours)
    assert found == rates(theirs)
    assert len(set(found)) > 2
    cycles = getattr(ours.lr_scheduler, "cycle_momentum", False)
    assert (flora.param_groups[0]["beta1"] != 0.9) == cycles
    assert flora.param_groups[0]["beta2"] is None  # DeepSpeed's 0.99 is not for the cycle


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_the_json_move_lr_as_they_move_adamws(name: str) -> None:
    launched_pool_of(2)(same_schedule, name)


def torch_schedule(stage: int) -> None:
    engine, flora = start(
        config_of(stage), lr_scheduler=lambda inner: LambdaLR(inner, lambda step: 0.5**step)
    )
    assert rates(engine) == [PARAMS["lr"] * 0.5**step for step in range(1, 6)]
    assert flora.param_groups[0]["lr"] == PARAMS["lr"] * 0.5**5


@pytest.mark.parametrize("stage", [1, 3])
def test_a_callable_makes_the_scheduler(stage: int) -> None:
    launched_pool_of(2)(torch_schedule, stage)


def still_at_rate_zero(stage: int) -> None:
    engine, flora = start(config_of(stage), lr_scheduler=lambda o: LambdaLR(o, lambda _: 0.0))
    train(engine, range(2))
    assert all(torch.equal(w, build().get_parameter(n)) for n, w in weights(engine).items())
    assert counts(flora) == {2}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_scheduled_lr_is_what_weights_move_by(stage: int) -> None:
    launched_pool_of(2)(still_at_rate_zero, stage)


# ---- parameters and optimizer


def named(model: torch.nn.Module) -> Any:
    return model.named_parameters()


def listed(model: torch.nn.Module) -> Any:
    return list(model.parameters())


def grouped(model: torch.nn.Module) -> Any:
    return [{"params": model.up.parameters()}, {"params": model.down.parameters()}]


def as_given(stage: int, choose: Callable[..., Any]) -> None:
    model = build()
    engine, _ = start(config_of(stage), model=model, model_parameters=choose(model))
    train(engine, range(3))
    plain, _ = start(config_of(stage))
    train(plain, range(3))
    assert all(torch.equal(weights(engine)[n], w) for n, w in weights(plain).items())


@pytest.mark.parametrize("choose", [named, listed])
@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_may_be_given_in_any_of_torchs_ways(stage: int, choose: Any) -> None:
    launched_pool_of(2)(as_given, stage, choose)


def group_settings(stage: int) -> None:
    model = build()
    groups = grouped(model)
    groups[1].update(lr=0.0, rank=None)
    engine, flora = start(config_of(stage), model=model, model_parameters=groups)
    train(engine, range(2))
    after, before = weights(engine), build()
    assert not torch.equal(after["up.weight"], before.up.weight)
    assert torch.equal(after["down.weight"], before.down.weight)
    how = {row.name: row.how for row in flora.report().rows}
    assert how["down.weight"].startswith("dense")
    assert "hadamard 2 per block of 8" in how["up.weight"]
    assert counts(flora) == {2}


@pytest.mark.parametrize("stage", STAGES)
def test_each_parameter_group_keeps_its_settings(stage: int) -> None:
    launched_pool_of(2)(group_settings, stage)


def by_object(stage: int) -> None:
    model = build()
    config = config_of(stage)
    plain, _ = start(config)
    del config["optimizer"]
    given = Flora(model.named_parameters(), **PARAMS)
    engine, flora = start(config, model=model, optimizer=given)
    assert flora is given
    called, _ = start(config, optimizer=lambda parameters: Flora(parameters, **PARAMS))
    wanted = [(train(each, range(2)), weights(each))[1] for each in (plain, engine, called)]
    for other in wanted[1:]:
        assert all(torch.equal(other[n], w) for n, w in wanted[0].items())


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_object_or_a_callable_stand_for_the_block(stage: int) -> None:
    launched_pool_of(2)(by_object, stage)


def another_by_callable() -> None:
    with pytest.raises(TypeError, match="has AdamW"):
        start(config_of(2), optimizer=lambda parameters: torch.optim.AdamW(parameters))


def test_a_callable_that_makes_another_optimizer_is_refused() -> None:
    launched_pool_of(1)(another_by_callable)


# ---- what it says and how it counts


def reported(stage: int, world_size: int) -> int:
    _, flora = start(config_of(stage))
    report = flora.report()
    assert {row.name for row in report.rows} == NAMES
    assert report.unnamed == 0
    elements = sum(row.local_elements for row in report.rows)
    whole = sum(p.numel() for p in build().parameters())
    assert elements == whole if stage == 0 else elements < whole or world_size == 1
    assert all(row.is_compressed for row in report.rows if row.name.endswith("weight"))
    return elements


@pytest.mark.parametrize("stage", STAGES)
def test_the_report_lists_every_parameter_of_every_group(stage: int) -> None:
    elements = launched_pool_of(2)(reported, stage, 2)
    if stage:  # each element is on one rank
        assert sum(elements) == WIDTH * 37 + 37 + 37 * OUTPUTS + OUTPUTS


def state_is_as_reported(stage: int) -> None:
    engine, flora = start(config_of(stage))
    train(engine, range(1))
    sizes = {
        name: sum(v.numel() * v.element_size() for v in own.values() if torch.is_tensor(v))
        for name, own in states(flora)
    }
    assert sum(sizes.values()) == flora.report().state_bytes
    # Nothing that DeepSpeed's swapper would take for elements of the partition.
    if stage:
        assert not any(torch.is_tensor(v) for state in flora.state.values() for v in state.values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_has_the_bytes_that_were_reported(stage: int) -> None:
    launched_pool_of(2)(state_is_as_reported, stage)


def counted(stage: int, accumulation: int, zero: dict[str, Any]) -> None:
    config = config_of(
        stage,
        gradient_accumulation_steps=accumulation,
        zero_optimization={"stage": stage, **zero},
    )
    model = build()
    engine, flora = start(config, model=model, model_parameters=grouped(model))
    train(engine, range(2 * accumulation))
    assert counts(flora) == {2}
    assert {name for name, _ in states(flora)} == NAMES if stage else True
    train(engine, range(accumulation - 1))
    assert counts(flora) == {2}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("stage", "zero"), [(0, {}), (1, {}), (2, {}), (3, {}), (3, {"sub_group_size": 400})]
)
def test_steps_are_counted_once_whatever_the_groups(
    stage: int, zero: dict[str, Any], accumulation: int
) -> None:
    launched_pool_of(2)(counted, stage, accumulation, zero)


def compiled(stage: int) -> None:
    engine, flora = start(config_of(stage))
    engine.compile(backend="eager")
    assert engine.is_compiled
    train(engine, range(3))
    plain, _ = start(config_of(stage))
    train(plain, range(3))
    assert counts(flora) == {3}
    found = weights(engine)
    # The same kernels in the same order.
    assert all(torch.equal(found[n], w) for n, w in weights(plain).items())


@pytest.mark.parametrize("stage", [2, 3])
def test_engine_compile_changes_nothing(stage: int) -> None:
    launched_pool_of(2)(compiled, stage)


def destroyed(stage: int) -> None:
    for _ in range(2):
        engine, flora = start(config_of(stage))
        train(engine, range(1))
        engine.destroy()
        assert counts(flora) == {1}


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_may_be_destroyed_and_another_built(stage: int) -> None:
    launched_pool_of(2)(destroyed, stage)
