# SPDX-License-Identifier: Apache-2.0
"""``import flora_dist.register``: engines that others build are attached as they are built."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch

import flora_dist.deepspeed
import flora_dist.register  # noqa: F401 - for what it does
from flora_dist import Flora
from flora_dist.frameworks.deepspeed.joining import join, without_adams
from tests.conftest import launched_pool_of
from tests.zero.small import PARAMS, build, config_of, counts, start, train, weights

pytestmark = pytest.mark.deepspeed
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
AUTO = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
"""As the Trainer fills in."""


def by_name() -> Any:
    named = {"type": "Flora", "params": {**PARAMS, **AUTO}}
    return deepspeed.initialize(None, build(), config_params=config_of(2, optimizer=named))[0]


def by_arguments() -> Any:
    named = {"type": "Flora", "params": dict(PARAMS)}
    args = Namespace(deepspeed_config=config_of(2, optimizer=named))
    return deepspeed.initialize(args, model=build())[0]


def without_block(**blocks: Any) -> dict[str, Any]:
    return {key: value for key, value in config_of(2, **blocks).items() if key != "optimizer"}


def by_object() -> Any:
    model = build()
    flora = Flora(model.parameters(), **PARAMS)
    return deepspeed.initialize(model=model, optimizer=flora, config=without_block())[0]


def by_object_with_offload() -> Any:
    model = build()
    flora = Flora(model.parameters(), **PARAMS)
    config = without_block(zero_optimization=OFFLOAD)
    return deepspeed.initialize(model=model, optimizer=flora, config=config)[0]


def by_callable() -> Any:
    config = without_block(zero_allow_untested_optimizer=True)
    model = build()
    return deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        optimizer=lambda parameters: Flora(parameters, **PARAMS),
        config=config,
    )[0]


WAYS: tuple[Callable[[], Any], ...] = (
    by_name,
    by_arguments,
    by_object,
    by_object_with_offload,
    by_callable,
)


def all_attached() -> None:
    ours, _ = start(config_of(2))
    train(ours, range(3))
    expected = weights(ours)
    for way in WAYS:
        engine = way()
        flora = flora_dist.deepspeed.attach(engine)  # again: nothing
        train(engine, range(3))
        assert counts(flora) == {3}, way
        found = weights(engine)
        assert all(torch.equal(found[name], value) for name, value in expected.items()), way
        engine.destroy()


def test_every_engine_with_flora_is_attached_as_it_is_built() -> None:
    launched_pool_of(2)(all_attached)


def refused(match: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        deepspeed.initialize(**given)


def all_refused() -> None:
    model = build()
    flora = Flora(model.parameters(), **PARAMS)
    given = {"model": model, "config": without_block(zero_allow_untested_optimizer=True)}
    adam = torch.optim.Adam(model.parameters())
    refused("a Flora was built for its param", {**given, "optimizer": adam})
    swapped = torch.optim.Adam(flora.param_groups)  # as accelerate does
    match = 'accelerate puts in place.*zero_force_ds_cpu_optimizer": false'
    refused(match, {**given, "optimizer": swapped})
    contrary = without_block(zero_allow_untested_optimizer=False)
    match = "needs 'zero_allow_untested_optimizer': true"
    refused(match, {**given, "optimizer": flora, "config": contrary})
    del flora, swapped
    engine, *_ = deepspeed.initialize(**given, optimizer=adam)
    train(engine, range(1))


def test_an_engine_that_would_train_with_another_optimizer_is_refused() -> None:
    launched_pool_of(2)(all_refused)


def test_what_auto_became_for_adam_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"optimizer": {"type": "Flora", "params": {"lr": 1e-3, **AUTO}}}
    assert without_adams(config)["optimizer"]["params"] == {"lr": 1e-3, "weight_decay": 0.0}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "betas=[0.9, 0.999], eps=1e-08" in said
    assert config["optimizer"]["params"]["eps"] == 1e-8  # the host's own stays


def test_what_somebody_chose_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"optimizer": {"type": "Flora", "params": {"eps": 1e-20, "beta1": 0.8}}}
    adam = {"optimizer": {"type": "Adam", "params": dict(AUTO)}}
    for config in (chosen, adam, {}):
        assert without_adams(config) == config
    assert capsys.readouterr().err == ""


def test_joining_twice_is_joining_once() -> None:
    before = deepspeed.initialize
    join()
    assert deepspeed.initialize is before
    assert "flora_dist.frameworks.deepspeed.joining" in sys.modules
