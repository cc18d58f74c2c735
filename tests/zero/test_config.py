# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's config with Flora in it: what is refused, and how it is found; no engine is built."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flora_dist.deepspeed
from flora_dist import Flora
from flora_dist.frameworks.deepspeed import engine
from flora_dist.frameworks.deepspeed.config import (
    check_flora_block,
    optimizer_settings,
    prepared,
)
from tests.zero.small import PARAMS, build, config_of


def of_roles(roles: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "Flora", "params": {**PARAMS, "roles": roles}}}


def refused(config: Any, match: str, kind: type[Exception] = ValueError, **more: Any) -> None:
    with pytest.raises(kind, match=match):
        flora_dist.deepspeed.initialize(model=build(), config=config, **more)


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ({"optimizer": {"type": "Flora", "parms": {}}}, "unknown key 'parms'.*'params'"),
        ({"optimizer": {"type": "Flora", "params": {"lrr": 1}}}, "unknown key 'lrr'.*'lr'"),
        ({"optimizer": {"type": "Flora", "params": {"betas": [0.9, 0.99]}}}, "'beta1'|'beta2'"),
        ({"optimizer": {"type": "Flora", "params": {"x" * 20: 1}}}, "Known: lr, weight_decay"),
        ({"optimizer": {"type": "flora", "params": {}}}, "must be 'Flora'; got 'flora'"),
        ({"optimizer": {"type": "AdamW", "params": {}}}, "must be 'Flora'; got 'AdamW'"),
        ({"optimizer": {"params": {}}}, "must be 'Flora'; got None"),
        ({"flora": {"gradient": "dense"}}, "unknown key 'gradient'.*'gradients'"),
        ({"flora": {"rank": 8}}, "unknown key 'rank'"),
        ({"flora": {"gradients": "compresed"}}, "Did you mean 'compressed'"),
        ({"flora": {"gradients": 1}}, "one of dense, compressed, fused; got 1. Write 'dense'"),
        ({"flora": {"gradients": "sharded"}}, 'cannot be "sharded" under ZeRO.*"compressed"'),
        ({"flora": {"gradients": "fused", "wire_dtype": "bf16"}}, "Did you mean 'bfloat16'"),
        ({"flora": {"gradients": "fused", "gradient_rank": 0}}, "at least 1; got 0"),
        ({"flora": {"gradients": "fused", "gradient_rank": 8}}, "below block; got 8.*block=8"),
        ({"flora": {"gradient_rank": 4}}, "'gradient_rank' says how.*'dense'"),
        ({"flora": {"gradients": "dense", "wire_dtype": "bfloat16"}}, "'wire_dtype' says how"),
        ({"FLORA": {"gradients": "dense"}}, "called \"flora\"; got 'FLORA'"),
        ({"Flora": {}}, "called \"flora\"; got 'Flora'"),
        ({"zero_allow_untested_optimizer": False}, "needs 'zero_allow_untested_optimizer': true"),
        ({"zero_force_ds_cpu_optimizer": True}, "needs 'zero_force_ds_cpu_optimizer': false"),
        ({"optimizer": {"type": "Flora", "params": {"rank": 0}}}, "rank"),
        (of_roles({"head": {"rnak": 4}}), "params.roles.head\" has the unknown key 'rnak'.*'rank'"),
        (of_roles({"head": {"check_every": 4}}), "unknown key 'check_every'"),
        (of_roles({"haed": {"rank": 4}}), "Did you mean 'head'"),
        (of_roles({"up.*": {"rank": 0}}), "rank must be a whole number"),
    ],
)
def test_a_config_that_would_not_do_what_it_says_is_refused(
    blocks: dict[str, Any], match: str
) -> None:
    refused(config_of(2, **blocks), match)


FP16 = {"fp16": {"enabled": True}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "blocks", "feature"),
    [
        (1, BF16, "data_types.grad_accum_dtype 'fp32' at stage 1"),
        (1, {**FP16, "data_types": {"grad_accum_dtype": "float32"}}, "data_types"),
        (0, FP16, "fp16 at stage 0"),
        (2, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        (2, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast in float16"),
        (2, {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
        (
            2,
            {"zero_optimization": {"stage": 2, "ignore_unused_parameters": False}},
            "ignore_unused_parameters",
        ),
    ],
)
def test_what_sketched_gradients_do_not_go_with_is_refused(
    stage: int, blocks: dict[str, Any], feature: str
) -> None:
    config = config_of(stage, flora={"gradients": "compressed"}, **blocks)
    refused(config, f"does not work with {feature}.* and compressed gradients: .*\\. [A-Z].*\\.$")
    check_flora_block({**config, "flora": {"gradients": "dense"}})


def test_what_sketched_gradients_go_with_is_not_refused() -> None:
    fused = {"gradients": "fused", "gradient_rank": 4, "wire_dtype": "bfloat16"}
    check_flora_block(config_of(2, flora=fused, **BF16))
    check_flora_block(config_of(1, flora=fused, bf16={"enabled": True}))
    check_flora_block(config_of(1, flora=fused, data_types={"grad_accum_dtype": "fp32"}))
    check_flora_block(config_of(3, flora=fused, **FP16, prescale_gradients=True))
    check_flora_block(config_of(0, flora=fused, fp16={"enabled": False}))


@pytest.mark.parametrize("block", ["flora", "optimizer"])
def test_a_block_that_is_no_object_is_refused(block: str) -> None:
    refused(config_of(2, **{block: "Flora"}), f'"{block}" must be an object', TypeError)


@pytest.mark.parametrize(
    ("roles", "block"), [([], "params.roles"), (None, "params.roles"), ({"head": 4}, "roles.head")]
)
def test_roles_that_are_no_objects_are_refused(roles: Any, block: str) -> None:
    refused(config_of(2, **of_roles(roles)), f'{block}" must be an object', TypeError)


@pytest.mark.parametrize("given", [None, "parameters", "named", "groups"])
def test_a_configs_roles_go_by_the_models_names_whatever_parameters_it_is_given(
    given: str | None,
) -> None:
    model, roles = build(), {"up.*": {"rank": None}, "*.bias": {"momentum": "none"}}
    parameters: Any = {
        None: None,
        "parameters": list(model.parameters()),
        "named": list(model.named_parameters()),
        "groups": [{"params": list(model.parameters()), "weight_decay": 0.1}],
    }[given]
    settings = optimizer_settings(of_roles(roles))
    found = {
        name: (group["rank"], group["momentum"], group["weight_decay"])
        for group in engine.by_settings(model, parameters, settings).param_groups
        for name in group["param_names"]
    }
    decay = 0.1 if given == "groups" else 0.0
    assert found == {
        "up.weight": (None, "blend", decay),
        "up.bias": (None, "blend", decay),
        "down.weight": (2, "blend", decay),
        "down.bias": (2, "none", decay),
    }


def test_roles_of_a_parameter_outside_the_model_are_refused() -> None:
    stray = nn.Parameter(torch.ones(4, 5))
    roles = of_roles({"up.*": {"rank": None}})
    refused(config_of(0, **roles), r"one of shape \(4, 5\) does not", model_parameters=[stray])


@pytest.mark.parametrize(
    ("blocks", "path"),
    [
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),  # DeepSpeed would train in fp32
        ({"optimizer": {"type": "Flora", "params": {"lr": "auto"}}}, "optimizer.params.lr"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "scheduler"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "zero_optimization"),
    ],
)
def test_auto_is_refused_since_nobody_fills_it_in(blocks: dict[str, Any], path: str) -> None:
    refused(config_of(2, **blocks), f'{path}.* is "auto".*attach')


def test_a_config_without_an_optimizer_needs_an_optimizer_object() -> None:
    config = config_of(2)
    del config["optimizer"]
    refused(config, 'needs an "optimizer" block')


def test_another_optimizer_is_a_type_error() -> None:
    model = build()
    with pytest.raises(TypeError, match="runs Flora; got AdamW"):
        flora_dist.deepspeed.initialize(
            model=model, config=config_of(2), optimizer=torch.optim.AdamW(model.parameters())
        )


def test_a_model_is_needed() -> None:
    with pytest.raises(ValueError, match="needs a model"):
        flora_dist.deepspeed.initialize(config=config_of(2))


def test_one_config_is_given_not_two_and_not_none() -> None:
    args = Namespace(deepspeed_config="zero2.json")
    refused(config_of(2), "got both", args=args)
    refused(None, "got neither")
    refused(None, "got neither", args=Namespace(deepspeed_config=None))


def test_a_config_is_read_from_a_path_by_argument_or_by_args(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config_of(2, flora={"gradint": "dense"})))
    refused(str(path), "unknown key 'gradint'")
    refused(None, "unknown key 'gradint'", args=Namespace(deepspeed_config=str(path)))
    refused(None, "unknown key 'gradint'", config_params=str(path))


def test_a_path_that_leads_nowhere_is_refused() -> None:
    refused("nowhere.json", "string path to an existing deepspeed config")


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"optimizer": {}, "optimizer": {}}')
    refused(str(path), "[Dd]uplicate keys")


def test_what_deepspeed_gets_is_a_copy_without_the_optimizer_block() -> None:
    config = config_of(2, flora={"gradients": "dense"})
    before = copy.deepcopy(config)
    result = prepared(config)
    result["zero_optimization"]["stage"] = 3
    assert config == before
    assert "optimizer" not in result
    assert result["zero_allow_untested_optimizer"] is True
    assert result["zero_force_ds_cpu_optimizer"] is False
    assert prepared(result) == result


def test_the_params_are_floras_arguments() -> None:
    assert optimizer_settings(config_of(2)) == PARAMS
    assert optimizer_settings({"optimizer": {"type": "Flora"}}) == {}


def test_a_parameter_outside_the_model_is_refused_before_anything_is_built() -> None:
    model, stray = build(), nn.Parameter(torch.ones(4, 5))
    optimizer = Flora([*model.parameters(), stray])
    with pytest.raises(ValueError, match=r"one of shape \(4, 5\) does not"):
        flora_dist.deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(0))
