# SPDX-License-Identifier: Apache-2.0
"""ZeRO 1 to 3 on weights in bfloat16 and no others: the reference's steps, and one copy of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flora_dist.deepspeed
from flora_dist.frameworks.deepspeed import attach, masters
from tests.conftest import launched_pool_of
from tests.zero import checkpoints, low_precision
from tests.zero.engines import Run
from tests.zero.small import build, config_of, start, train, weights

ALONE = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
STAGES = (1, 2, 3)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_given_the_same_gradients_weights_are_the_references_bit_for_bit(stage: int) -> None:
    # The oracle rounds with the same bits, so a weight differs only where float32 before rounding
    # does, by more than the bits tell apart: nowhere in ten steps.
    run = Run(stage=stage, dtype="bf16 alone", settings={"momentum": "flora"})
    found, distances = launched_pool_of(2)(low_precision.follow_gradients, run)[0]
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    assert distances == (0.0, 0.0)


def held(stage: int, shared: bool = True) -> dict[str, Any]:
    """Where an engine's weights are, before a step and after three."""
    if not shared:
        attach.share_weights = lambda _: None
    try:
        engine, flora = start(config_of(stage, **ALONE))
    finally:
        attach.share_weights = masters.share_weights
    stepped = [slot.part.weight() for slot in flora.slots() if slot.part.weight().numel()]
    own = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    first = weights(engine)
    train(engine, range(3))
    last = weights(engine)
    found = {
        "dtypes": {tensor.dtype for tensor in (*stepped, *own)},
        "outside": len(_storages(stepped) - _storages(own)),
        "moved": [name for name in first if not first[name].equal(last[name])],
        "skipped": engine.skipped_steps,
    }
    engine.destroy()
    return found


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_stepped_is_the_memory_of_the_models_weights(stage: int) -> None:
    for found in launched_pool_of(2)(held, stage):
        assert found["dtypes"] == {torch.bfloat16}
        assert found["outside"] == 0
        assert set(found["moved"]) == dict(build().named_parameters()).keys()
        assert found["skipped"] == 0
    # DeepSpeed's own copies are not.
    assert all(found["outside"] > 0 for found in launched_pool_of(2)(held, stage, False))


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_such_an_engine_saves_and_goes_on_bit_for_bit(stage: int, tmp_path: Any) -> None:
    launched_pool_of(2)(checkpoints.goes_on, stage, ALONE, str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_of(0, **ALONE), "outside of bf16 and ZeRO 1 to 3"),
        (config_of(2, bf16={**ALONE["bf16"], "enabled": False}), "outside of bf16"),
        (
            config_of(
                2,
                zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}},
                **ALONE,
            ),
            "offload of the optimizer.*Leave out",
        ),
    ],
)
def test_what_deepspeed_lacks_is_refused_before_it_builds_anything(
    config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        flora_dist.deepspeed.initialize(model=build(), config=config)


def test_another_layout_of_partitions_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Renamed:
        bf16_master_weights_and_gradients = True

    monkeypatch.setitem(masters._NAMES, Renamed, ("partitions",))
    with pytest.raises(RuntimeError, match=r"has no partitions.*Use DeepSpeed"):
        masters.share_weights(Renamed())


def test_copies_that_differ_from_the_models_weights_are_not_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stale:
        bf16_master_weights_and_gradients = True

    pair = (torch.ones(3), torch.zeros(3))
    monkeypatch.setitem(masters._NAMES, Stale, ())
    monkeypatch.setattr(masters, "_pairs", lambda _: [pair])
    with pytest.raises(RuntimeError, match="other weights in its masters"):
        masters.share_weights(Stale())
    assert pair[0].equal(torch.ones(3))
