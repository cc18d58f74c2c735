# SPDX-License-Identifier: Apache-2.0
"""Engines that sketch gradients: what they prove of DeepSpeed, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flora_dist.deepspeed
from flora_dist import Flora
from flora_dist.frameworks.deepspeed.config import prepared
from tests.conftest import launched_pool_of
from tests.zero import sketched_faults
from tests.zero.small import PARAMS, batch, build, by_host, config_of, start

pytestmark = pytest.mark.deepspeed

COMPRESSED = {"flora": {"gradients": "compressed"}}


@pytest.mark.parametrize(
    ("stage", "fault", "said"),
    [
        *[(s, "passed by", "must be left to their hooks; the reducer took one") for s in (2, 3)],
        *[(s, "norm asked", "must compute the norm of its gradients") for s in (1, 3)],
        # DeepSpeed's own scaling would write to what stands in for the gradients: torch's error.
        *[(s, "scale asked", "refers to a single memory location") for s in (1, 3)],
    ],
)
def test_a_deepspeed_that_goes_another_way_is_noticed(stage: int, fault: str, said: str) -> None:
    for message in launched_pool_of(2)(sketched_faults.error, stage, fault):
        assert said in message
        assert "0.19.8" in message or fault == "scale asked"


def gradient_written() -> None:
    engine, _ = start(config_of(2, **COMPRESSED))
    weight = engine.module.up.weight
    engine.module.down.weight.register_post_accumulate_grad_hook(
        lambda _: setattr(weight, "grad", torch.zeros_like(weight))
    )
    # Up's own gradient comes after that and is taken together with it; down's own is gone by then.
    engine.module.up.weight.register_post_accumulate_grad_hook(
        lambda parameter: setattr(parameter, "grad", torch.zeros_like(parameter))
    )
    with pytest.raises(RuntimeError, match=r"of shape \(37, 24\) was left in \.grad"):
        engine.backward(engine(batch(0)))


def test_a_gradient_that_somebody_writes_is_noticed() -> None:
    launched_pool_of(2)(gradient_written)


def refused(config: dict[str, Any], match: str, attributes: dict[str, Any]) -> None:
    """An engine of DeepSpeed's own, with its attributes changed."""
    model = build()
    flora = Flora(model.parameters(), **PARAMS)
    engine = by_host(model=model, optimizer=flora, config=prepared(config))
    for name, value in attributes.items():
        setattr(engine, name, value)
    with pytest.raises(ValueError, match=match):
        flora_dist.deepspeed.attach(engine)
    assert not any(getattr(p, "ds_grad_is_ready", True) is False for p in model.parameters())
    engine.destroy()


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("config", "match", "attributes"),
    [
        (config_of(1, **BF16, **COMPRESSED), "Use stage 2", {}),
        (config_of(2, flora={"gradients": "sharded"}), 'cannot be "sharded" under ZeRO', {}),
        (config_of(3, flora={"gradients": "compresed"}), "Did you mean 'compressed'", {}),
        (config_of(2, **COMPRESSED), "sequence parallelism", {"sequence_parallel_size": 2}),
    ],
)
def test_attach_refuses_before_anything_changes(
    config: dict[str, Any], match: str, attributes: dict[str, Any]
) -> None:
    launched_pool_of(2)(refused, config, match, attributes)
