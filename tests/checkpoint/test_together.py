# SPDX-License-Identifier: Apache-2.0
"""Ranks that save and load together, saves in the background, and faults that would be noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flora_dist import Flora, checkpoint
from flora_dist.checkpoint import canonical, contents, fitting, saving
from tests.battery import zoo
from tests.battery.oracle import Case
from tests.battery.variants import differing
from tests.checkpoint.layouts import HALF, LAYOUTS, Trained, resume, save_half_way
from tests.checkpoint.two import SETTINGS, Two, everything, train, trained
from tests.conftest import pool_of

# ---- together


def _one_rank_differs(folder: Path) -> str:
    model = Two(25 if dist.get_rank() == 1 and (folder / "latest").exists() else 24)
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    if not (folder / "latest").exists():
        dist.barrier()
        checkpoint.save(folder, model, optimizer, step=1)
        return ""
    dist.barrier()
    before = everything(model, optimizer)
    try:
        checkpoint.load(folder, model, optimizer)
    except ValueError as error:
        assert differing(everything(model, optimizer), before) == []
        return str(error)
    return "loaded"


@pytest.mark.ranks(2)
def test_what_one_rank_finds_every_rank_raises(tmp_path: Path) -> None:
    pool = pool_of(2)
    assert pool(_one_rank_differs, tmp_path) == ["", ""]
    errors = pool(_one_rank_differs, tmp_path)
    assert all("linear.weight" in error and "(10, 25)" in error for error in errors), errors


def _frozen_and_not_the_optimizers(folder: Path) -> list[str]:
    ends = []
    for seed in (0, 1):
        model = zoo.build(torch.float32)
        with torch.no_grad():
            model.frozen.weight.fill_(float(seed))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = Flora(trained, **SETTINGS)
        model(zoo.batch(0, 2))  # leaves whole copies in the place of parameters
        if seed == 0:
            checkpoint.save(folder, model, optimizer, step=1)
        else:
            checkpoint.load(folder, model, optimizer)
        model.reshard()  # drops what was written into whole copies
        ends.append(model(zoo.batch(0, 2)).detach())
    return differing({"loss": ends[0]}, {"loss": ends[1]})


@pytest.mark.ranks(2)
def test_frozen_parameters_come_back_while_fsdp_holds_whole_copies(tmp_path: Path) -> None:
    assert pool_of(2)(_frozen_and_not_the_optimizers, tmp_path) == [[], []]


# ---- in the background


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path: Path) -> None:
    model, optimizer = trained()
    then = everything(model, optimizer)
    saving = checkpoint.save_async(tmp_path, model, optimizer, step=2)
    train(model, optimizer, 3)
    later = checkpoint.save_async(tmp_path, model, optimizer, step=5)
    assert saving.wait() == tmp_path / "step-00000002"
    assert later.wait() == checkpoint.latest(tmp_path)
    checkpoint.load(tmp_path / "step-00000002", model, optimizer)
    assert differing(everything(model, optimizer), then) == []


def test_what_fails_in_the_background_is_raised_by_wait(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / "file").write_text("")
    saving = checkpoint.save_async(tmp_path / "file", model, optimizer, step=2)
    with pytest.raises(ValueError, match="file"):
        saving.wait()
    assert checkpoint.save_async(tmp_path / "good", model, optimizer, step=2).wait().is_dir()


def _in_background(folder: Path) -> list[str]:
    model = zoo.build(torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    trained = Trained(
        model=model,
        optimizer=optimizer,
        share=lambda batch: zoo.share(batch, dist.get_rank(), dist.get_world_size()),
        weights=dict,
    )
    trained.run(range(2))
    then = trained.everything()
    saving = checkpoint.save_async(folder, model, optimizer, step=2)
    trained.run(range(2, 5))  # messages of training and of the save go on side by side
    saving.wait()
    checkpoint.load(folder, model, optimizer)
    return differing(trained.everything(), then)


@pytest.mark.ranks(2)
def test_ranks_train_on_while_they_save(tmp_path: Path) -> None:
    assert pool_of(2)(_in_background, tmp_path) == [[], []]


# ---- the tests above would fail


CASE = Case(dtype=torch.float32, settings={"weight_decay": 0.1})


def _no_counters(manifest: Any) -> dict[str, Any]:
    counters = contents.saved_counters(manifest)
    return {name: {**own, "step": 1} if "step" in own else own for name, own in counters.items()}


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "state is read": (fitting, "state_boxes", lambda *_: []),
    "weights are read": (fitting, "element_boxes", lambda *_: []),
    "counters": (fitting, "saved_counters", _no_counters),
    "settings": (fitting, "_settings_of", lambda _, group, __: {"lr": group["lr"]}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, save_half_way("plain", CASE, folder)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_mechanism_is_seen(
    mutation: str, plain: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, end = plain
    assert differing(resume("plain", CASE, folder), end) == []
    monkeypatch.setattr(*MUTATIONS[mutation])
    assert differing(resume("plain", CASE, folder), end)


def _save_with_every_holder(folder: Path) -> str:
    """As if all who hold a piece of a block saved it."""
    original = contents.owned_boxes
    contents.owned_boxes = canonical.state_boxes  # type: ignore[assignment]
    try:
        trained = LAYOUTS["fsdp1 x2"][1](CASE, zoo.build(CASE.dtype))
        trained.run(range(HALF))
        trained.save(folder)
    except ValueError as error:
        return str(error)
    finally:
        contents.owned_boxes = original
    return "saved"


@pytest.mark.ranks(2)
def test_blocks_that_two_ranks_save_are_noticed(tmp_path: Path) -> None:
    errors = pool_of(2)(_save_with_every_holder, tmp_path)
    assert all("valid" in error for error in errors), errors


def test_gaps_in_what_was_saved_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    half = canonical.Box(offsets=(0, 0), values=torch.zeros(5, 24))
    original = contents.gather

    def gappy(*arguments: Any) -> contents.Contents:
        whole = original(*arguments)
        key = "model.linear.weight"
        cut = saving.Boxes(shape=(10, 24), dtype=torch.float32, boxes=[half])
        return contents.Contents(
            tensors={**whole.tensors, key: cut},
            parameters=whole.parameters,
            groups=whole.groups,
        )

    monkeypatch.setattr(checkpoint.api, "gather", gappy)
    checkpoint.save(tmp_path, model, optimizer, step=1)
    with pytest.raises(ValueError, match=r"'model\.linear\.weight'.*has gaps"):
        checkpoint.load(tmp_path, model, optimizer)


def test_files_that_no_hash_stands_for_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    monkeypatch.setattr(saving, "_own_files", lambda *_: [".metadata"])
    checkpoint.save(tmp_path, model, optimizer, step=1)
    with pytest.raises(ValueError, match=r"__0_0\.distcp.*does not list"):
        checkpoint.load(tmp_path, model, optimizer)
