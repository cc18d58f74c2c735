# SPDX-License-Identifier: Apache-2.0
"""``attach`` on engines that others built, and what happens without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flora_dist.deepspeed
import flora_dist.register  # noqa: F401 - for what it does
from flora_dist import Flora
from tests.conftest import launched_pool_of
from tests.zero.small import (
    PARAMS,
    STAGES,
    build,
    by_host,
    config_of,
    counts,
    start,
    train,
    weights,
)

pytestmark = pytest.mark.deepspeed
UNTESTED = {"zero_allow_untested_optimizer": True}
BF16 = {"bf16": {"enabled": True}}


def by_deepspeed(stage: int, **blocks: Any) -> Any:
    """An engine of DeepSpeed's own, which knows the type since it is registered."""
    return by_host(model=build(), config=config_of(stage, **UNTESTED, **blocks))


def registered(stage: int) -> None:
    assert torch.optim.Flora is Flora
    engine = by_deepspeed(stage)
    flora = flora_dist.deepspeed.attach(engine)
    assert {row.name for row in flora.report().rows} >= {"up.weight"}
    train(engine, range(3))
    ours, _ = start(config_of(stage))
    train(ours, range(3))
    assert all(torch.equal(weights(engine)[n], w) for n, w in weights(ours).items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_registered_type_and_attach_do_what_initialize_does(stage: int) -> None:
    launched_pool_of(2)(registered, stage)


def level_refused(block: dict[str, str], words: str) -> None:
    engine = by_deepspeed(1, flora=block)
    with pytest.raises(ValueError, match=words):
        flora_dist.deepspeed.attach(engine)
    engine.destroy()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"gradients": "sharded"}, 'cannot be "sharded" under ZeRO'),
        ({"gradient": "dense"}, "Did you mean 'gradients'"),
    ],
)
def test_attach_refuses_a_flora_block_that_it_cannot_follow(
    block: dict[str, str], words: str
) -> None:
    # Incident: engines that others built trained at level dense whatever the block said.
    launched_pool_of(2)(level_refused, block, words)


def other_names() -> None:
    engine, flora = start(config_of(2))
    train(engine, range(2))
    saved = flora.state_dict()
    flat = next(iter(saved["state"]))
    saved["state"][flat] = {f"old.{name}": s for name, s in saved["state"][flat].items()}
    before = weights(engine)
    with pytest.raises(ValueError, match=r"the state has 'old\.down\.bias', the tensor"):
        flora.load_state_dict(saved)
    assert all(torch.equal(before[name], value) for name, value in weights(engine).items())
    assert not any(name.startswith("old.") for state in flora.state.values() for name in state)


def test_state_of_parameters_that_a_partition_does_not_hold_is_refused() -> None:
    # Incident: it was kept beside new zeros, and the run went on as if it had never trained.
    launched_pool_of(2)(other_names)


def unattached(stage: int, blocks: dict[str, Any]) -> None:
    engine = by_deepspeed(stage, **blocks)  # steps once on zeros in stage 0: must not raise
    with pytest.raises(ValueError, match=r"flora_dist\.deepspeed\.attach\(engine\)"):
        train(engine, range(1))
    flora = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert not flora.state


@pytest.mark.parametrize(
    ("stage", "blocks"), [(0, BF16), (1, {}), (2, {}), (3, {}), (1, BF16), (2, BF16), (3, BF16)]
)
def test_the_first_step_names_attach_where_nobody_attached(
    stage: int, blocks: dict[str, Any]
) -> None:
    launched_pool_of(2)(unattached, stage, blocks)


def needs_no_attach() -> None:
    nameless = by_deepspeed(0)
    with pytest.raises(ValueError, match=r"several processes every parameter must have a name"):
        train(nameless, range(1))
    model = build()
    flora = Flora(model.named_parameters(), **PARAMS)
    config = {key: value for key, value in config_of(0).items() if key != "optimizer"}
    engine = by_host(model=model, optimizer=flora, config=config)
    train(engine, range(2))
    assert counts(engine.optimizer) == {2}
    with pytest.raises(ValueError, match="before the first step"):
        flora_dist.deepspeed.attach(engine)


def test_stage_0_in_fp32_steps_without_attach_and_is_refused_it_afterwards() -> None:
    launched_pool_of(2)(needs_no_attach)


def after_steps(stage: int) -> None:
    engine, flora = start(config_of(stage))
    train(engine, range(1))
    # Attached before: a second call is nothing, also now.
    assert flora_dist.deepspeed.attach(engine) is flora
    train(engine, range(1))
    assert counts(flora) == {2}


@pytest.mark.parametrize("stage", STAGES)
def test_attaching_twice_is_attaching_once(stage: int) -> None:
    launched_pool_of(2)(after_steps, stage)


def moved_to_another_engine() -> None:
    model = build()
    flora = Flora(model.named_parameters(), **PARAMS)
    first, _ = start(config_of(0), model=model, optimizer=flora)
    train(first, range(1))
    with pytest.raises(ValueError, match="before the first step"):
        start(config_of(0), model=model, optimizer=flora)


def test_an_optimizer_that_has_stepped_is_not_attached_to_another_engine() -> None:
    launched_pool_of(1)(moved_to_another_engine)


def with_adamw(stage: int) -> None:
    adamw = {"type": "AdamW", "params": {"torch_adam": True}}
    engine = by_host(model=build(), config=config_of(stage, optimizer=adamw))
    with pytest.raises(TypeError, match="this one has AdamW"):
        flora_dist.deepspeed.attach(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_with_another_optimizer_is_a_type_error(stage: int) -> None:
    launched_pool_of(2)(with_adamw, stage)


def without_optimizer(stage: int) -> None:
    config = config_of(stage)
    del config["optimizer"]
    engine = by_host(model=build(), config=config)
    with pytest.raises(TypeError, match="needs an engine whose optimizer is Flora"):
        flora_dist.deepspeed.attach(engine)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_optimizer_is_a_type_error(stage: int) -> None:
    launched_pool_of(2)(without_optimizer, stage)


def frozen_on_the_way(stage: int, blocks: dict[str, Any]) -> None:
    engine, flora = start(config_of(stage, **blocks))
    frozen = engine.module.up.weight
    train(engine, range(2))
    before = weights(engine)
    frozen.requires_grad_(False)
    assert "up.weight" not in {row.name for row in flora.report().rows}
    train(engine, range(2, 5))
    after = weights(engine)
    still = [name for name in after if torch.equal(after[name], before[name])]
    assert still == ["up.weight"], still
    frozen.requires_grad_(True)
    train(engine, range(5, 7))
    assert not torch.equal(weights(engine)["up.weight"], after["up.weight"])
    assert counts(flora) == {4, 7}
    engine.destroy()


@pytest.mark.parametrize(
    ("stage", "blocks"),
    [(0, {}), (0, BF16), (1, {}), (2, {}), (2, BF16), (3, {})],
    ids=["0", "0 in bf16", "1", "2", "2 in bf16", "3"],
)
def test_a_parameter_frozen_on_the_way_stands_still(stage: int, blocks: dict[str, Any]) -> None:
    """DeepSpeed's gradients of zeros moved it on by its momentum and weight decay."""
    launched_pool_of(2)(frozen_on_the_way, stage, blocks)
