# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 from networks of which a process has its stretches alone: the weights of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flora_dist.trainer.by_rows import draw_rows
from flora_dist.trainer.by_stretches import check_partitions
from flora_dist.trainer.config import Config
from flora_dist.trainer.new_network import place_in
from flora_dist.trainer.place import Stretch, Unfit
from flora_dist.trainer.pretrained_rows import read_rows
from flora_dist.trainer.replicated import World
from tests.conftest import launched_pool_of
from tests.trainer.stretch_runs import (
    partitioned,
    put_into_another_partition,
    with_trouble_on_one,
)
from tests.trainer.support import tiny_overrides
from tests.trainer.test_trainer_by_rows import NETWORKS
from tests.trainer.test_trainer_engines import zero

FLORA, ADAMW = (f"optimizer={{name: {name}, lr: 1e-2}}" for name in ("flora", "adamw"))
ODD = LlamaConfig(
    hidden_size=33,
    intermediate_size=48,
    num_hidden_layers=2,
    vocab_size=51,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
)
"""Parameters that two processes cannot halve, tied."""


def saved(network: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(network, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["tied, with a padding token", "experts"])
def test_stretches_of_all_processes_are_the_whole_network_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    network, folder = NETWORKS[name], saved(NETWORKS[name], tmp_path)
    torch.manual_seed(1)
    whole = dict(AutoModelForCausalLM.from_config(network, dtype=torch.float).named_parameters())
    ways: dict[str, Callable[[Stretch], Any]] = {
        "drawn": lambda place: draw_rows(network, place, seed=1, dtype=torch.float),
        "read": lambda place: read_rows(folder, network, place, seed=0, dtype=torch.float),
    }
    for way, start in ways.items():
        parts = [start(Stretch(number=number, count=7)).rows for number in range(7)]
        assert list(parts[0]) == list(whole), way
        for key, parameter in whole.items():
            own = [part[key] for part in parts]
            assert torch.equal(torch.cat(own), parameter.flatten()), (way, key)
            assert all(each.untyped_storage().nbytes() == each.nbytes for each in own), (way, key)


@pytest.mark.deepspeed
def test_an_engine_has_the_whole_networks_weights(corpus: Path, tmp_path: Path) -> None:
    folder = saved(ODD, tmp_path / "saved", torch.bfloat16)
    drawn, read = f"model={{config: {folder}/config.json}}", f"model={{pretrained: {folder}}}"
    cases = [
        tiny_overrides(corpus, tmp_path, *zero("zero3"), kind, start, f"train.precision={how}")
        for kind, start, how in (
            (FLORA, drawn, "float32"),
            (ADAMW, read, "bfloat16"),
            (FLORA, drawn, "bfloat16-pure"),
        )
    ]
    nothing: list[list[str]] = [[], [], []]
    assert launched_pool_of(2)(partitioned, cases, str(folder)) == [nothing, nothing]


@pytest.mark.deepspeed
def test_if_one_process_cannot_draw_its_stretches_all_draw_the_whole_network(
    corpus: Path, tmp_path: Path
) -> None:
    folder = saved(NETWORKS["llama"], tmp_path / "saved")
    model = f"model={{config: {folder}/config.json}}"
    overrides = tiny_overrides(corpus, tmp_path, *zero("zero3"), FLORA, model)
    first, second = launched_pool_of(2)(with_trouble_on_one, overrides, str(folder))
    assert first == (
        True,
        ["2 of 2 processes draw the whole network: process 0 had no trouble and knows no cause"],
    )
    assert second == (True, ["2 of 2 processes draw the whole network: weight is special"])


@pytest.mark.deepspeed
def test_partitions_of_another_length_are_noticed() -> None:
    for message in launched_pool_of(2)(put_into_another_partition):
        assert "that of 'layer.weight' is (8, torch.float32)" in message


def test_only_zero_3_starts_from_stretches(tiny: Callable[..., Config]) -> None:
    world = World(process_rank=1, size=2, device=torch.device("cpu"))
    third = tiny(*zero("zero3"), FLORA)
    assert place_in(third, world) == Stretch(number=1, count=2)
    assert place_in(tiny(*zero("zero2"), FLORA), world) is None
    assert place_in(tiny(*zero("zero3"), FLORA, "model.lora={rank: 2}"), world) is None


def test_settings_whose_partitions_are_no_stretches_are_named() -> None:
    plain = {"stage": 3, "zero_hpz_partition_size": 1, "offload_param": {"device": "cpu"}}
    check_partitions({"zero_optimization": plain})
    for change, said in (
        ({"mics_shard_size": 2}, "mics_shard_size=2 partitions are those of a few processes"),
        ({"offload_param": {"device": "nvme"}}, "partitions are on disk"),
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size=2 partitions are kept twice"),
        (
            {"zero_quantized_nontrainable_weights": True},
            "weights=True partitions are quantized where weights are frozen",
        ),
    ):
        with pytest.raises(Unfit, match=said):
            check_partitions({"zero_optimization": {**plain, **change}})
