# SPDX-License-Identifier: Apache-2.0
"""Forged checkpoints of DeepSpeed are refused by their folder, and read within their length."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist import Flora
from flora_dist.checkpoint.convert.command import convert


def deepspeed_folder(folder: Path, head: Any, saved: Any = None) -> Path:
    folder.mkdir()
    torch.save(head, folder / "mp_rank_00_model_states.pt")
    torch.save(saved or {}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


HEAD: dict[str, Any] = {
    "module": {"w": torch.ones(4, 4)},
    "param_shapes": [{"w": torch.Size((4, 4))}],
    "dp_world_size": 1,
    "global_steps": 1,
}
GROUP = {**Flora([torch.zeros(1)]).param_groups[0], "params": [0]}
STATES: dict[str, Any] = {
    "optimizer_state_dict": {
        "zero_stage": 2,
        "group_paddings": [0],
        "single_partition_of_fp32_groups": [torch.ones(16)],
        "base_optimizer_state": {"state": {}, "param_groups": [GROUP]},
    }
}


def changed_states(**changed: Any) -> dict[str, Any]:
    return {"optimizer_state_dict": {**STATES["optimizer_state_dict"], **changed}}


STRUCTURES: dict[str, tuple[Any, Any]] = {
    "a world of 10^9": ({**HEAD, "dp_world_size": 10**9}, STATES),
    "a world in words": ({**HEAD, "dp_world_size": "two"}, STATES),
    "no world": ({k: v for k, v in HEAD.items() if k != "dp_world_size"}, STATES),
    "steps in words": ({**HEAD, "global_steps": "two"}, STATES),
    "no shapes": ({k: v for k, v in HEAD.items() if k != "param_shapes"}, STATES),
    "shapes that are a number": ({**HEAD, "param_shapes": 3}, STATES),
    "shapes beyond the partitions": (
        {**HEAD, "param_shapes": [{"w": torch.Size((1 << 30, 1 << 20))}]},
        STATES,
    ),
    "a padding of 10^15": (
        {**HEAD, "param_shapes": [{"w": torch.Size((1 << 30, 1 << 20))}]},
        changed_states(group_paddings=[1 << 50]),
    ),
    "more shapes than partitions": ({**HEAD, "param_shapes": [{}, {}]}, STATES),
    "no module": ({k: v for k, v in HEAD.items() if k != "module"}, STATES),
    "a module that is a list": ({**HEAD, "module": [1]}, STATES),
    "nothing in the states": (HEAD, {"a": 1}),
    "states that are a list": (HEAD, {"optimizer_state_dict": [1]}),
    "partitions that are words": (
        HEAD,
        changed_states(single_partition_of_fp32_groups=["a"]),
    ),
    "no groups": (HEAD, changed_states(base_optimizer_state={"state": {}})),
    "a group with lr in words": (
        HEAD,
        changed_states(base_optimizer_state={"state": {}, "param_groups": [{**GROUP, "lr": "a"}]}),
    ),
    "a tensor that repeats one number": (
        HEAD,
        changed_states(single_partition_of_fp32_groups=[torch.ones(1).expand(1 << 40)]),
    ),
    "stage 0 without groups": ({**HEAD, "optimizer": {"optimizer_state_dict": {}}}, None),
    "stage 0 that is a number": ({**HEAD, "optimizer": 3}, None),
}


def test_deepspeeds_own_structure_is_converted(tmp_path: Path) -> None:
    # Else the cases below would prove nothing.
    source = deepspeed_folder(tmp_path / "source", HEAD, STATES)
    assert convert(source, tmp_path / "file.pt").step == 1


@pytest.mark.parametrize("what", STRUCTURES)
def test_what_deepspeed_never_writes_is_refused_by_its_folder(what: str, tmp_path: Path) -> None:
    """A world of 10^9 took all memory; most others were a bare KeyError."""
    source = deepspeed_folder(tmp_path / "source", *STRUCTURES[what])
    with pytest.raises(ValueError, match=str(source)):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def _packed(content: bytes) -> bytes:
    """The same entries, compressed."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["compressed", "of an old torch", "a FIFO", "empty", "1 TB"])
def test_files_that_could_take_more_memory_than_they_are_long_are_refused(
    kind: str, tmp_path: Path
) -> None:
    source = deepspeed_folder(tmp_path / "source", HEAD, STATES)
    file = source / "mp_rank_00_model_states.pt"
    raw = file.read_bytes()
    file.unlink()
    if kind == "a FIFO":
        os.mkfifo(file)
    elif kind == "1 TB":
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    elif kind == "of an old torch":
        torch.save(HEAD, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(_packed(raw) if kind == "compressed" else b"")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt"):
        convert(source, tmp_path / "converted")
