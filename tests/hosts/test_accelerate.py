# SPDX-License-Identifier: Apache-2.0
"""accelerate's own loop with Flora: prepare, accumulate, clip, save and load, on every layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor
from torch.utils.data import DataLoader

import flora_dist.accelerate
import flora_dist.register  # noqa: F401 - for what it does
from flora_dist import Flora
from tests.conftest import launched_pool_of
from tests.hosts.small import (
    DECAY,
    LR,
    MAX_NORM,
    SAMPLES,
    SETTINGS,
    STEPS,
    Samples,
    blank,
    build,
    distance,
    host_of,
    is_zero,
    whole_weights,
    zero_config,
)
from tests.hosts.trainer_runs import SKETCHES, by_hand

pytestmark = pytest.mark.deepspeed
MICRO_BATCHES = 2
Case = tuple[str, bool]
"""A mode, and whether gradients are sketched."""
CASES: list[Case] = [
    *((mode, False) for mode in ("plain", "ddp", "fsdp2", "zero2", "zero3", "offload")),
    *((mode, True) for mode in ("plain", "ddp", "fsdp2", "zero2")),
]
OTHERS: list[Case] = [("zero3", True), ("offload", True)]


def accelerator_of(mode: str, blocks: dict[str, Any]) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    given: dict[str, Any] = {"gradient_accumulation_steps": MICRO_BATCHES}
    if is_zero(mode):
        config = zero_config(mode, **blocks) | {"gradient_clipping": MAX_NORM}
        config["gradient_accumulation_steps"] = MICRO_BATCHES
        given["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
    if mode == "fsdp2":
        given["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
        )
    return Accelerator(**given)


class Loop:
    """A user's script."""

    def __init__(self, mode: str, *, sketched: bool, is_blank: bool = False) -> None:
        blocks: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False}
        if sketched:
            blocks["flora"] = SKETCHES
        self.accelerator = accelerator_of(mode, blocks)
        model = blank() if is_blank else build()
        optimizer = Flora(model.named_parameters(), lr=LR, weight_decay=DECAY, **SETTINGS)
        size = SAMPLES // MICRO_BATCHES // self.accelerator.num_processes
        loader = DataLoader(Samples(), batch_size=size)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        if sketched and not is_zero(mode):
            flora_dist.accelerate.attach(self.accelerator, self.model, self.optimizer, **SKETCHES)

    def run(self, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch).loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return whole_weights(self.model)


def trained_and_resumed(case: Case, folder: str) -> tuple[dict[str, Tensor], bool]:
    """Weights at the end, and whether a run that goes on from a saved state has the same bits."""
    mode, sketched = case
    with host_of(mode):
        loop = Loop(mode, sketched=sketched)
        loop.run(STEPS // 2)
        loop.accelerator.save_state(folder)
        weights = loop.run(STEPS - STEPS // 2)
    with host_of(mode):
        again = Loop(mode, sketched=sketched, is_blank=True)
        again.accelerator.load_state(folder)
        resumed = again.run(STEPS - STEPS // 2)
    return weights, all(torch.equal(resumed[name], weights[name]) for name in weights)


def all_cases(cases: list[Case], folder: str) -> dict[Case, Any]:
    return {case: trained_and_resumed(case, f"{folder}/{case[0]}-{case[1]}") for case in cases}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Any]:
    folder = str(tmp_path_factory.mktemp("accelerate"))
    several = [case for case in CASES if case[0] != "plain"]
    single = [case for case in CASES if case[0] == "plain"]
    return {**launched_pool_of(2)(all_cases, several, folder)[0], **all_cases(single, folder)}


@pytest.fixture(scope="module")
def expected() -> dict[bool, dict[str, Tensor]]:
    return {
        False: by_hand(kept=set()).weights,
        True: by_hand(kept=set(), sketches=SKETCHES).weights,
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{'-sketched' * case[1]}")
def test_accelerates_loop_is_the_plain_one_and_resumes_bit_for_bit(
    case: Case, runs: dict[Case, Any], expected: dict[bool, dict[str, Tensor]]
) -> None:
    weights, is_equal = runs[case]
    assert distance(weights, expected[case[1]]) < 1e-5
    assert is_equal


@pytest.mark.slow
def test_accelerates_loop_is_so_with_sketches_on_every_other_layout(
    tmp_path: Path, expected: dict[bool, dict[str, Tensor]]
) -> None:
    runs = launched_pool_of(2)(all_cases, OTHERS, str(tmp_path))[0]
    for case, (weights, is_equal) in runs.items():
        assert distance(weights, expected[True]) < 1e-5, case
        assert is_equal, case


def swapped() -> str:
    # DeepSpeed compiles that optimizer's step for a minute, and it takes none here.
    with host_of("offload"), patch.object(CPUAdamBuilder, "load"):
        accelerator = accelerator_of("offload", {})
        model = build()
        optimizer = Flora(model.named_parameters(), lr=LR, **SETTINGS)
        loader = DataLoader(Samples(), batch_size=SAMPLES // dist.get_world_size())
        with pytest.raises(ValueError, match="accelerate puts in place") as raised:
            accelerator.prepare(model, optimizer, loader)
        return str(raised.value)


def test_an_optimizer_that_accelerate_swaps_for_adam_is_missed() -> None:
    """It trained DeepSpeedCPUAdam, without a word."""
    for said in launched_pool_of(2)(swapped):
        assert "DeepSpeedCPUAdam" in said
        assert '"zero_force_ds_cpu_optimizer": false' in said


def refused_clippings(mode: str) -> list[str]:
    """What clipping says by another norm, of fewer parameters, and where no line attached."""
    with host_of(mode):
        loop = Loop(mode, sketched=True)
        batch = next(iter(loop.loader))
        loop.accelerator.backward(loop.model(**batch).loss)
        clip, parameters = loop.accelerator.clip_grad_norm_, list(loop.model.parameters())
        said = []
        for given in ((parameters, MAX_NORM, 1), (parameters[:2], MAX_NORM)):
            with pytest.raises((ValueError, RuntimeError)) as raised:
                clip(*given)
            said.append(str(raised.value))
        return said


def test_accelerates_clipping_of_sketches_is_refused_by_the_hosts_own_words() -> None:
    for norm, fewer in launched_pool_of(2)(refused_clippings, "ddp"):
        assert "accelerator.clip_grad_norm_ got norm_type=1" in norm
        for word in ("accelerator.clip_grad_norm_ by flora_dist.accelerate.attach", "FloraTrainer"):
            assert word in fewer


def test_a_parameter_by_itself_is_clipped_as_torch_clips_it() -> None:
    model = torch.nn.Linear(8, 8)
    flora = Flora(model.named_parameters())
    accelerator = SimpleNamespace(clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
    handle = flora_dist.accelerate.attach(accelerator, model, flora, "compressed")
    handle.remove()
    model(torch.ones(4, 8)).sum().backward()
    accelerator.clip_grad_norm_(model.weight, 1.0)
    assert model.weight.grad is not None
    assert float(model.weight.grad.norm()) == pytest.approx(1.0)
