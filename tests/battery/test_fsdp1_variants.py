# SPDX-License-Identifier: Apache-2.0
"""FSDP1 as it is really used, against the reference.

The tolerances are those of ``test_layouts.py``, argued there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import ShardingStrategy

from flora_dist import Flora, by_position
from tests.battery import fsdp1_runs, layouts, zoo
from tests.battery.mutations import MUTATIONS, SPAN_MUTATIONS
from tests.battery.oracle import SAMPLES, STEPS, Case, distances, reference_run, trainable
from tests.battery.test_layouts import EXACT, FLOAT_MODEL, FLOAT_PARAMETER
from tests.battery.variants import Gradients, Weights, follow
from tests.conftest import pool_of

# Every kind of sum at once: clip, scale, and weight decay on the way.
CASE = Case(settings={"momentum": "flora", "scale_parameter": True, "weight_decay": 0.1})


@cache
def _expected(momentum: str = "") -> tuple[Weights, Weights]:
    return reference_run(Case(settings={"momentum": momentum}) if momentum else CASE)


@pytest.mark.parametrize(
    ("variant", "world_size"),
    [(name, size) for name, (sizes, _) in fsdp1_runs.VARIANTS.items() for size in sizes],
)
def test_a_variant_of_fsdp1_equals_the_reference(variant: str, world_size: int) -> None:
    for weights in pool_of(world_size)(fsdp1_runs.run, variant, CASE):
        assert distances(*_expected(), weights)[1] < EXACT


@pytest.mark.parametrize("momentum", ["flora", "flora_strict"])
@pytest.mark.parametrize("mutation", [*MUTATIONS, *SPAN_MUTATIONS])
def test_fsdp1_sees_a_broken_mechanism(mutation: str, momentum: str) -> None:
    case = Case(settings={"momentum": momentum})
    weights = pool_of(3)(layouts.run, "fsdp1 x3", case, mutation)[0]
    assert not distances(*_expected(momentum), weights)[1] < 1e6 * EXACT


@pytest.mark.parametrize(
    ("variant", "world_size", "mutation"),
    [
        ("hybrid_shard", 4, "sums within the shard group"),
        ("use_orig_params=False", 2, "names in the model"),
    ],
)
def test_fsdp1_sees_a_wrong_map(variant: str, world_size: int, mutation: str) -> None:
    weights = pool_of(world_size)(fsdp1_runs.run, variant, CASE, mutation)[0]
    assert not distances(*_expected(), weights)[1] < 1e6 * EXACT


def test_attach_proves_the_map_on_every_rank() -> None:
    for message in pool_of(3)(fsdp1_runs.attach_with, "padding between parameters", CASE):
        assert message.startswith("RuntimeError")
        assert f"torch {torch.__version__}" in message


@pytest.mark.parametrize(
    ("variant", "world_size", "messages"),
    [
        # a sum, after an exchange between the holders of cut rows
        ("shard_grad_op", 3, 2),
        ("no_shard", 2, 0),
        # two ranks share each cut: nothing beside the sum
        ("hybrid_shard", 4, 1),
        ("hybrid_shard, groups of their own", 4, 1),
        ("use_orig_params=False", 3, 2),
    ],
)
def test_the_number_of_messages_under_fsdp1_is_fixed(
    variant: str, world_size: int, messages: int
) -> None:
    assert set(pool_of(world_size)(fsdp1_runs.count, variant, CASE)) == {messages}


def test_fsdp1_takes_positions_as_a_plain_run_does() -> None:
    model = zoo.build(CASE.dtype)
    start = trainable(model)
    optimizer = by_position(model.parameters(), **CASE.flora)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(zoo.batch(step, SAMPLES)).backward()
        optimizer.step()
    for weights in pool_of(2)(fsdp1_runs.unnamed, CASE):
        assert distances(start, trainable(model), weights)[1] < EXACT


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_tied_parameter_has_its_name_of_a_plain_run(use_orig_params: bool) -> None:
    plain = Flora(fsdp1_runs.Tied().named_parameters(), **CASE.flora)
    expected = [row.name for row in plain.report().rows]
    options = {"use_orig_params": use_orig_params}
    assert pool_of(2)(fsdp1_runs.tied_names, CASE, options) == [expected] * 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_clip_grad_norm_of_fsdp1_clips_by_the_norm_of_the_whole_gradient(world_size: int) -> None:
    # In fp32: FSDP1's own clipping refuses float64.
    case, max_norm, exact = Case(dtype=torch.float32), 0.05, []

    def clipped(step: int, gradients: Gradients) -> Gradients:
        del step
        given = {name: g for name, g in gradients.items() if g is not None}
        norm = torch.stack([g.norm() for g in given.values()]).norm()
        exact.append(float(norm))
        return {name: g * (max_norm / (norm + 1e-6)) for name, g in given.items()}

    expected = follow(case, zoo.build(case.dtype), change=clipped)
    assert min(exact) > 2 * max_norm
    for weights, norms in pool_of(world_size)(fsdp1_runs.clip, case, max_norm):
        assert norms == pytest.approx(exact, rel=1e-5)
        whole, worst = distances(*expected, weights)
        assert whole < FLOAT_MODEL
        assert worst < FLOAT_PARAMETER


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp32_weights_under_bf16_compute_follow_the_gradients_of_fsdp1(
    reduce_dtype: torch.dtype,
) -> None:
    case = Case(dtype=torch.float32)
    fp32 = reference_run(case)
    for weights, (whole, worst) in pool_of(2)(fsdp1_runs.mixed_precision, case, reduce_dtype):
        assert whole < FLOAT_MODEL
        assert worst < FLOAT_PARAMETER
        assert distances(*fp32, weights)[0] < 2e-2  # bf16 has 8 bits: 4e-3 per product


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_report_counts_the_bytes_under_fsdp1_exactly(world_size: int) -> None:
    for reported, measured in pool_of(world_size)(fsdp1_runs.count_bytes, CASE):
        assert reported == measured


@pytest.mark.parametrize(
    ("options", "is_built_first"),
    [
        ({}, False),
        ({}, True),
        ({"use_orig_params": False}, False),
        ({"sharding_strategy": ShardingStrategy.NO_SHARD}, False),
    ],
    ids=["views", "built before wrapping", "use_orig_params=False", "no_shard"],
)
def test_an_optimizer_that_nobody_attached_is_refused(
    options: dict[str, Any], is_built_first: bool
) -> None:
    # Incident in every peer: views are taken for vectors, and dense state is kept in silence.
    for message, kept in pool_of(2)(fsdp1_runs.step_unattached, CASE, options, is_built_first):
        assert "flora_dist.fsdp1.attach(model, optimizer)" in message
        assert kept == 0


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("plain", "ValueError", "Wrap it first"),
        ("adam", "TypeError", "AdamW"),
        ("stranger", "ValueError", "none of its 2 tensors"),
        ("turned", "ValueError", "'weight' is not"),
        ("unsharded", "ValueError", "Set use_orig_params=True"),
    ],
)
def test_attach_refuses_what_would_be_wrong(name: str, error: str, words: str) -> None:
    for messages in _refusals():
        assert messages[name].startswith(error)
        assert words in messages[name]


@cache
def _refusals() -> list[dict[str, str]]:
    return pool_of(2)(fsdp1_runs.refusals, CASE)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_torchs_own_states_of_optimizers_are_refused_under_fsdp1(use_orig_params: bool) -> None:
    """They failed in torch's depths: "Manually calculated _sharded_numel_padded is incorrect"."""
    for messages, own in pool_of(2)(fsdp1_runs.ask_as_torch_does, use_orig_params):
        assert len(messages) == 4
        for message in messages:
            assert "sketches and means" in message
            assert "flora_dist.checkpoint.save" in message
        assert own > 0  # each rank's own state is still to be had


def test_attach_refuses_tensor_parallelism_under_fsdp1() -> None:
    for message in pool_of(4)(fsdp1_runs.tensor_parallel, CASE):
        assert "'0.weight' is a DTensor" in message
