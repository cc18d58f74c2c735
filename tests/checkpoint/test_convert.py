# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of DeepSpeed and of torch's DCP become ours, offline, and their runs go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from flora_dist import Flora, checkpoint, cli
from flora_dist.checkpoint.convert import deepspeed as convert_deepspeed
from flora_dist.checkpoint.convert.command import convert
from flora_dist.checkpoint.convert.whole import Whole, read_whole
from flora_dist.core.layouts.flat import cut_line
from tests.battery.oracle import SAMPLES, distances
from tests.battery.test_layouts import FLOAT_MODEL, FLOAT_PARAMETER
from tests.checkpoint import conversions
from tests.checkpoint.conversions import END, HALF, go_on, plain
from tests.conftest import launched_pool_of, pool_of
from tests.zero import engines
from tests.zero.engines import Run
from tests.zero.expected import distances_that_move
from tests.zero.small import config_of

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 20}}
FREE = {"gradient_clipping": 0.0}
ACCUMULATED = {"data_types": {"grad_accum_dtype": "fp32"}}
ENGINES = {
    "0, named": (2, Run(stage=0, groups=True)),
    "0 bf16, named": (2, Run(stage=0, dtype="bf16", groups=True, settings={"state_bits": 8})),
    "1 fp16 x3": (
        3,
        Run(stage=1, dtype="fp16", config={"scheduler": SCHEDULER}, settings={"state_bits": 4}),
    ),
    "1 bf16, gradients in fp32": (2, Run(stage=1, dtype="bf16", config=ACCUMULATED)),
    "2 x3, round robin": (
        3,
        Run(stage=2, groups=True, zero={"round_robin_gradients": True}, config=FREE),
    ),
    "2 offloaded": (2, Run(stage=2, zero={"offload_optimizer": {"device": "cpu"}})),
    "3": (2, Run(stage=3, groups=True)),
    "3 x3 bf16, sub-groups": (
        3,
        Run(stage=3, dtype="bf16", zero={"sub_group_size": 500}, groups=True),
    ),
}
# Each of DeepSpeed's five classes of optimizers writes files of its own. Offloaded ones are those
# of the same class, and stage 3 on two ranks has no part that sub-groups on three have not.
SLOW = ("2 offloaded", "3")
CROWDS = {
    "0": config_of(0, scheduler=SCHEDULER, bf16={"enabled": True}),
    "2": config_of(2, flora={"gradients": "compressed"}),
    "3": config_of(3),
}


def assert_equal(found: Whole, wanted: Whole) -> None:
    """Every bit, number and setting; groups by names, since the order of a partition is free."""
    assert found.step == wanted.step == HALF
    assert found.tensors.keys() == wanted.tensors.keys()
    for key, tensor in wanted.tensors.items():
        assert found.tensors[key].dtype == tensor.dtype, key
        assert torch.equal(found.tensors[key], tensor), key
    assert found.counters == wanted.counters
    assert found.shapes == wanted.shapes
    assert [(set(n), s) for n, s in found.groups] == [(set(n), s) for n, s in wanted.groups]
    assert found.extra == wanted.extra


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ENGINES]
)
def test_what_deepspeed_saves_becomes_what_we_save(name: str, tmp_path: Path) -> None:
    size, run = ENGINES[name]
    launched_pool_of(size)(conversions.zoo_on_an_engine, run, tmp_path)
    assert convert(tmp_path / "native", tmp_path / "converted").form == "DeepSpeed"
    assert_equal(read_whole(tmp_path / "converted"), read_whole(tmp_path / "ours"))


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", ["2", "3"])
def test_frozen_parameters_and_buffers_are_converted(stage: str, tmp_path: Path) -> None:
    launched_pool_of(2)(conversions.crowd_on_an_engine, CROWDS[stage], tmp_path)
    convert(tmp_path / "native", tmp_path / "converted")
    assert_equal(read_whole(tmp_path / "converted"), read_whole(tmp_path / "ours"))


@pytest.mark.deepspeed
def test_a_partition_that_is_read_as_another_is_noticed(tmp_path: Path) -> None:
    launched_pool_of(3)(conversions.zoo_on_an_engine, Run(stage=1), tmp_path)

    def shifted(line: Any, *, offsets: list[int], **where: Any) -> Any:
        return cut_line(line, offsets=[*offsets[:1], *(o - 1 for o in offsets[1:])], **where)

    with (
        patch.object(convert_deepspeed, "cut_line", shifted),
        pytest.raises(ValueError, match="must be a tensor of shape"),
    ):
        convert(tmp_path / "native", tmp_path / "converted")


@pytest.mark.deepspeed
def test_a_run_goes_on_from_an_engine_on_a_plain_model(tmp_path: Path) -> None:
    """Within three times the battery's tolerances, as engines against the reference."""
    size, run = ENGINES["2 x3, round robin"]
    launched_pool_of(size)(conversions.zoo_on_an_engine, run, tmp_path)
    begin = dict(engines.build().named_parameters())
    model, optimizer = plain(run)
    wanted = go_on(model, optimizer, range(END), engines.SAMPLES)

    convert(tmp_path / "native", tmp_path / "folder")
    model, optimizer = plain(run)
    checkpoint.load(tmp_path / "folder", model, optimizer)
    found = go_on(model, optimizer, range(HALF, END), engines.SAMPLES)
    whole, parameter = distances_that_move({n: begin[n].detach() for n in wanted}, wanted, found)
    assert whole < 3 * FLOAT_MODEL
    assert parameter < 3 * FLOAT_PARAMETER

    convert(tmp_path / "native", tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    model, optimizer = plain(run)
    model.load_state_dict(content["model"])  # strict: tied and frozen ones too
    optimizer.load_state_dict(content["optimizer"])
    again = go_on(model, optimizer, range(HALF, END), engines.SAMPLES)
    assert all(torch.equal(again[name], weight) for name, weight in found.items())


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_what_dcp_saves_becomes_what_we_save(flat: bool, tmp_path: Path) -> None:
    pool_of(2)(conversions.zoo_on_fsdp2, flat, tmp_path)
    done = convert(tmp_path / "native", tmp_path / "converted")
    assert (done.form, done.left_out) == ("torch DCP", ("when",))
    assert_equal(read_whole(tmp_path / "converted"), read_whole(tmp_path / "ours"))

    begin = {n: p.detach() for n, p in plain()[0].named_parameters() if p.requires_grad}
    wanted = go_on(*plain(), range(END), SAMPLES)
    model, optimizer = plain()
    checkpoint.load(tmp_path / "converted", model, optimizer)
    found = go_on(model, optimizer, range(HALF, END), SAMPLES)
    whole, parameter = distances(begin, wanted, found)
    assert whole < FLOAT_MODEL
    assert parameter < FLOAT_PARAMETER

    # ours to one file, on to the same bits
    convert(tmp_path / "converted", tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    model, optimizer = plain()
    content["model"]["head.weight"] = content["model"]["embed.weight"]  # tied; only a model knows
    content["model"] = {n: t.view(model.state_dict()[n].shape) for n, t in content["model"].items()}
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    again = go_on(model, optimizer, range(HALF, END), SAMPLES)
    assert all(torch.equal(again[name], weight) for name, weight in found.items())


# ---- what is refused


@pytest.mark.deepspeed
def test_stage_0_must_say_which_parameters_its_states_are_of(tmp_path: Path) -> None:
    launched_pool_of(2)(conversions.crowd_on_an_engine, CROWDS["0"], tmp_path)
    with pytest.raises(ValueError, match="4 states without names, and 5 parameters"):
        convert(tmp_path / "native", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_in_a_file_of_deepspeed_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {"module": {}, "dp_world_size": 1, "state": Evil(trace)}
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt.: it has "):
        convert(tmp_path, tmp_path / "converted")
    assert not trace.exists()


def test_a_pickle_in_a_dcp_checkpoint_is_not_run(tmp_path: Path) -> None:
    trace, (model, optimizer) = tmp_path / "trace", plain()
    weights, states = get_state_dict(model, optimizer)
    dcp.save(
        {"model": weights, "optimizer": states, "more": Evil(trace)}, checkpoint_id=tmp_path / "a"
    )
    trace.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"'more' in .*distcp"):
        convert(tmp_path / "a", tmp_path / "converted")
    assert not trace.exists()


def test_another_optimizer_and_other_keys_are_refused(tmp_path: Path) -> None:
    model = plain()[0]
    adam = torch.optim.AdamW(model.parameters())
    weights, states = get_state_dict(model, adam)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / "adam")
    dcp.save({"net": weights}, checkpoint_id=tmp_path / "net")
    with pytest.raises(ValueError, match="must have Flora's settings"):
        convert(tmp_path / "adam", tmp_path / "converted")
    with pytest.raises(ValueError, match="must have the keys 'model' and 'optimizer'"):
        convert(tmp_path / "net", tmp_path / "converted")


@pytest.mark.deepspeed
def test_a_missing_file_of_a_rank_is_refused(tmp_path: Path) -> None:
    launched_pool_of(2)(conversions.zoo_on_an_engine, Run(stage=1), tmp_path)
    next(tmp_path.glob("native/*/*rank_1*optim_states.pt")).unlink()
    with pytest.raises(ValueError, match="one file of optimizer states for each of 2 ranks"):
        convert(tmp_path / "native", tmp_path / "converted")


def test_the_command_says_what_it_did(tmp_path: Path, capsys: Any) -> None:
    model, optimizer = plain()
    go_on(model, optimizer, range(2), SAMPLES)
    checkpoint.save(tmp_path / "a", model, optimizer, step=2, extra={"seen": 2})
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt")]) == 0
    assert "flora_dist checkpoint of step 2: wrote" in capsys.readouterr().out
    assert torch.load(tmp_path / "b.pt", weights_only=True)["extra"] == {"seen": 2}
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b.pt")]) == 2
    assert "does not overwrite files" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "c"), str(tmp_path / "d")]) == 2
    assert "holds none of their files" in capsys.readouterr().err


class Crowd(torch.nn.Module):
    """A frozen convolution and a buffer without dims, beside a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3).requires_grad_(requires_grad=False)
        self.norm = torch.nn.BatchNorm1d(8)
        self.linear = torch.nn.Linear(8, 16)


def test_a_file_made_of_ours_has_the_models_own_shapes(tmp_path: Path) -> None:
    model = Crowd()
    optimizer = Flora(model.linear.named_parameters(), rank=2, block=8)
    checkpoint.save(tmp_path / "ours", model, optimizer, step=1)
    convert(tmp_path / "ours", tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    shapes = {name: value.shape for name, value in content["model"].items()}
    assert shapes["conv.weight"] == (4, 2, 3, 3)
    assert shapes["norm.num_batches_tracked"] == ()
