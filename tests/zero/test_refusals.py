# SPDX-License-Identifier: Apache-2.0
"""Features of DeepSpeed that Flora would compute wrong: refused before the first step.

``initialize`` refuses what the config says before it builds anything. ``attach`` is shown on real
engines that have the feature; with Flora, DeepSpeed itself builds none with ZenFlow (it asks for
settings of its own AdamW), partial offload (CPUAdam only) or, without CUDA, SuperOffload.
"""

from __future__ import annotations

from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.module_inject import set_autotp_mode
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from deepspeed.utils import groups
from torch import Tensor, nn

import flora_dist.deepspeed
import flora_dist.register  # noqa: F401 - for what it does
from flora_dist.frameworks.deepspeed.config import check_features
from tests.conftest import launched_pool_of
from tests.zero.small import WIDTH, build, by_host, config_of, start

CPU = {"device": "cpu"}


def zero(stage: int, **block: Any) -> dict[str, Any]:
    return config_of(stage, zero_optimization={"stage": stage, **block})


def nvme(folder: str = "nowhere") -> dict[str, Any]:
    return {"device": "nvme", "nvme_path": folder}


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (config_of(2, compile={"deepcompile": True}), "DeepCompile"),
        (config_of(1, tensor_parallel={"autotp_size": 2}), "AutoTP"),
        (zero(2, offload_optimizer=CPU, zenflow={"topk_ratio": 0.1}), "ZenFlow"),
        (zero(3, offload_optimizer={**CPU, "super_offload": True}), "SuperOffload"),
        (zero(3, offload_optimizer={**CPU, "ratio": 0.5}), "partial offload"),
        (zero(3, zero_hpz_partition_size=2), "ZeRO\\+\\+ hpZ"),
        (zero(3, zero_quantized_gradients=True), "ZeRO\\+\\+ qgZ"),
        (zero(2, elastic_checkpoint=True), "elastic checkpoints"),
        (config_of(2, checkpoint={"load_universal": True}), "universal checkpoints"),
        (zero(3, offload_optimizer=nvme()), "NVMe offload of the optimizer"),
        (zero(3, offload_optimizer=CPU, offload_param=nvme()), "NVMe offload of parameters"),
    ],
)
def test_what_the_config_says_is_refused_before_anything_is_built(
    config: dict[str, Any], feature: str
) -> None:
    with pytest.raises(ValueError, match=f"does not work with {feature}: .*\\. [A-Z].*\\.$"):
        flora_dist.deepspeed.initialize(model=build(), config=config)
    assert not dist.is_initialized()


def test_a_feature_that_is_off_is_not_refused() -> None:
    check_features(
        zero(
            3,
            zenflow=None,
            offload_optimizer={**CPU, "super_offload": False, "ratio": 1.0},
            offload_param=CPU,
            zero_hpz_partition_size=1,
        )
    )
    check_features(config_of(1, compile={"deepcompile": False}, tensor_parallel={"autotp_size": 1}))


def refused(config: dict[str, Any], feature: str, model: nn.Module | None = None) -> None:
    """An engine that has the feature, from DeepSpeed itself."""
    config = {**config, "zero_allow_untested_optimizer": True}
    engine = by_host(model=model or build(), config=config)
    with pytest.raises(ValueError, match=f"does not work with {feature}: "):
        flora_dist.deepspeed.attach(engine)
    engine.destroy()


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (config_of(2, compile={"deepcompile": True}), "DeepCompile"),
        (zero(2, offload_optimizer={**CPU, "super_offload": True}), "SuperOffload"),
        (zero(3, zero_hpz_partition_size=2), "ZeRO\\+\\+ hpZ"),
    ],
)
def test_attach_refuses_an_engine_with_the_feature(config: dict[str, Any], feature: str) -> None:
    launched_pool_of(2)(refused, {**config, "zero_force_ds_cpu_optimizer": False}, feature)


def on_disk(folder: str) -> None:
    config = zero(3, offload_optimizer=nvme(folder), sub_group_size=400_000)
    refused({**config, "zero_force_ds_cpu_optimizer": False}, "NVMe offload of the optimizer")


@pytest.mark.deepspeed
@pytest.mark.skipif(
    find_library("aio") is None, reason="DeepSpeed's async_io needs libaio (apt: libaio-dev)"
)
@pytest.mark.slow  # compiles DeepSpeed's async_io once
def test_attach_refuses_an_engine_that_swaps_to_disk(tmp_path: Path) -> None:
    launched_pool_of(2)(on_disk, str(tmp_path))


class Experts(nn.Module):
    """A layer and a mixture of two experts; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.experts = MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=1)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.experts(self.up(x_NI))[0].square().mean()


def experts_refused(stage: int) -> None:
    refused(config_of(stage), "MoE layers", Experts())


@pytest.mark.deepspeed
def test_moe_layers_are_refused() -> None:
    launched_pool_of(2)(experts_refused, 0)


class TwoWide:
    """A model parallel unit, as Megatron has it, of two ranks."""

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2


def unit_refused() -> None:
    engine = by_host(model=build(), config={**config_of(1), "zero_allow_untested_optimizer": True})
    engine.mpu = TwoWide()
    with pytest.raises(ValueError, match="does not work with tensor parallelism of an mpu: "):
        flora_dist.deepspeed.attach(engine)
    engine.mpu = None
    engine.destroy()


@pytest.mark.deepspeed
def test_the_tensor_parallelism_of_a_model_parallel_unit_is_refused() -> None:
    launched_pool_of(2)(unit_refused)


def pipeline_refused(stage: int) -> None:
    layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda out, _: out.square().mean())
    refused(config_of(stage), "pipelines", model)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1])
def test_pipelines_are_refused(stage: int) -> None:
    launched_pool_of(2)(pipeline_refused, stage)


def tensor_parallel_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    blocks = {"tensor_parallel": {"autotp_size": 2}, "bf16": {"enabled": True}}
    try:
        refused(config_of(1, **blocks), "AutoTP", model)
    finally:  # DeepSpeed keeps it for every later engine of the process
        groups.mpu = None
        set_autotp_mode(training=False)
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP"):
            if hasattr(groups, name):
                setattr(groups, name, None)
    dist.barrier()
    start(config_of(1))  # they are gone


@pytest.mark.deepspeed
def test_automatic_tensor_parallelism_is_refused() -> None:
    launched_pool_of(2)(tensor_parallel_refused)
