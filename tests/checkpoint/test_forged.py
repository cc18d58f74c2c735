# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that somebody made up, every hash mended: refused, before memory or state changes."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from flora_dist import checkpoint
from flora_dist.checkpoint.canonical import Box
from flora_dist.checkpoint.convert.command import convert
from flora_dist.checkpoint.convert.engine_facts import facts_in
from flora_dist.checkpoint.convert.whole import Assembly
from flora_dist.checkpoint.folder import Manifest, hash_files, read_manifest
from flora_dist.checkpoint.stored import tiles_exactly
from tests.checkpoint.small import SETTINGS, Run, start
from tests.checkpoint.test_manifest import forge

KEY = "model.first.weight"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, Path]:
    """A run that has gone on, and its checkpoint."""
    run = start(data=0)
    run.train([1])
    path = checkpoint.save(tmp_path / "all", run.model, run.optimizer, step=1, extra={"a": 1})
    run.train([2])
    return run, path


def refused(run: Run, path: Path, said: str) -> None:
    """Loading and converting refuse it; the running state stays."""
    before = run.state()
    with pytest.raises(ValueError, match=said):
        checkpoint.load(path, run.model, run.optimizer)
    assert run.state() == before


def mended(path: Path, **fields: Any) -> None:
    """Make the manifest fit the files as they are now."""
    known = [*read_manifest(path).files]
    forge(path, files={n: asdict(f) for n, f in hash_files(path, known).items()}, **fields)


# ---- every element once


def boxes_of_a_grid(drawn: random.Random, shape: tuple[int, ...]) -> list[Any]:
    cuts = [sorted({0, size, *(drawn.randrange(size) for _ in range(2))}) for size in shape]
    spans = [[(a, b - a) for a, b in itertools.pairwise(each)] for each in cuts]
    return [
        (tuple(o for o, _ in box), tuple(s for _, s in box)) for box in itertools.product(*spans)
    ]


def covered_once(shape: tuple[int, ...], boxes: list[Any]) -> bool:
    """By counting, element by element."""
    counts = torch.zeros(shape)
    for offsets, sizes in boxes:
        counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    return bool((counts == 1).all())


def test_a_proof_by_corners_says_what_counting_each_element_says() -> None:
    drawn, found = random.Random(0), []
    for _ in range(400):
        shape = tuple(drawn.randrange(1, 5) for _ in range(drawn.randrange(4)))
        boxes = boxes_of_a_grid(drawn, shape)
        for _ in range(drawn.randrange(3)):  # doubled, moved, or left out
            which = drawn.randrange(len(boxes))
            offsets, sizes = boxes[which]
            moved = tuple(drawn.randrange(n - s + 1) for n, s in zip(shape, sizes, strict=True))
            boxes[which : which + 1] = drawn.choice([[], [(moved, sizes)], [(offsets, sizes)] * 2])
            if not boxes:
                break
        found.append(covered_once(shape, boxes))
        assert tiles_exactly(shape, boxes) == found[-1], (shape, boxes)
    assert 100 < sum(found) < 300


def _twice(metadata: Metadata) -> None:
    """The upper half at both places: sizes add up, the lower half is never read."""
    stored = metadata.state_dict_metadata[KEY]
    assert isinstance(stored, TensorStorageMetadata)
    (chunk,) = stored.chunks
    rows, columns = chunk.sizes
    half = ChunkStorageMetadata(offsets=torch.Size((0, 0)), sizes=torch.Size((rows // 2, columns)))
    stored.chunks[:] = [half, half]


def _shared(metadata: Metadata) -> None:
    """Two tensors in the same bytes: a small file would ask for any amount of memory."""
    places = metadata.storage_data
    own, other = MetadataIndex(KEY, (0, 0)), MetadataIndex("model.last.weight", (0, 0))
    places[other] = places[own]


def _elsewhere(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex(KEY, (0, 0))]


def _too_short(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex(KEY, (0, 0))].length = 100


STORED: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "chunks that overlap": (_twice, "has elements twice, and gaps"),
    "tensors that share bytes": (_shared, r"__0_0\.distcp' has \d+ bytes, its boxes together"),
    "a chunk without bytes": (_elsewhere, "has no bytes at"),
    "a chunk of too few bytes": (_too_short, "needs 1920 bytes"),
}


@pytest.mark.parametrize("what", STORED)
def test_tensors_that_files_do_not_hold_once_are_refused(
    what: str, saved: tuple[Run, Path], tmp_path: Path
) -> None:
    """Overlapping chunks whose sizes add up loaded memory as it happened to be."""
    run, path = saved
    change, said = STORED[what]
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    mended(path)
    refused(run, path, said)
    with pytest.raises(ValueError, match=said):
        convert(path, tmp_path / "file.pt")


def test_partitions_that_overlap_are_no_whole_tensor(tmp_path: Path) -> None:
    assembly, half = Assembly(), Box(offsets=(0, 0), values=torch.ones(2, 3))
    for _ in range(2):
        assembly.add("w", (4, 3), torch.float32, [half])
    with pytest.raises(ValueError, match="must hold all of every tensor, once"):
        assembly.finish(tmp_path)


# ---- settings and counters


def change_settings(document: dict[str, Any], name: str, value: Any) -> None:
    document["groups"][0]["settings"][name] = value


def change_counters(document: dict[str, Any], name: str, value: Any) -> None:
    document["parameters"]["first.weight"][name] = value


WRONG_RATES: list[Any] = ["a", -1, -0.5, None, True, [0.1], 10**400, float("nan"), float("inf")]
WRONG_COUNTS: list[Any] = ["a", -1, 10**30, True, None, 1.5, [1]]
NUMBERS: list[tuple[Any, str, Any]] = [
    *((change_settings, name, v) for name in ("lr", "weight_decay") for v in WRONG_RATES),
    *((change_settings, "maximize", value) for value in ("a", 1, 10**30, None)),
    *((change_settings, name, ["x"]) for name in SETTINGS),
    *((change_settings, "sketch", value) for value in ("normal", {}, 3)),
    *((change_counters, name, value) for name in ("step", "window") for value in WRONG_COUNTS),
    *((change_counters, name, 7) for name in ("format", "seed", "sketch", "gradients")),
    *((change_counters, name, "a") for name in ("format", "seed", "sketch", "gradients")),
    (change_counters, "momentum", 3),
    (change_counters, "position", 0),
    (change_counters, "shape", [24, 21]),
]


def test_numbers_that_no_run_has_are_refused_and_change_nothing(saved: tuple[Run, Path]) -> None:
    """ "a", -1 and 10^30 loaded; a bad lr failed after the weights had been replaced."""
    run, path = saved
    document = json.loads((path / "manifest.json").read_bytes())
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    for change, name, value in NUMBERS:
        changed = json.loads(json.dumps(document))
        change(changed, name, value)
        forge(path, **{key: changed[key] for key in ("groups", "parameters")})
        refused(run, path, name if change is change_settings else "first.weight")
    change_settings(document, "lr", 1e39)
    forge(path, groups=document["groups"], parameters=document["parameters"])
    refused(run, path, "lr must fit the tensor that the group has")


def test_settings_of_torchs_optimizers_are_of_the_running_ones_kind(tmp_path: Path) -> None:
    run = start(data=0)
    adam = torch.optim.AdamW(run.model.parameters(), lr=0.01)
    path = checkpoint.save(tmp_path, run.model, adam, step=1)
    document = json.loads((path / "manifest.json").read_bytes())
    for name, value in (
        *(("lr", value) for value in WRONG_RATES),
        *(("betas", value) for value in (0.9, ["a", 0.9], "x")),
        *(("amsgrad", value) for value in ("no", 1)),
        ("eps", "a"),
    ):
        changed = json.loads(json.dumps(document))
        change_settings(changed, name, value)
        forge(path, groups=changed["groups"])
        refused(Run(model=run.model, optimizer=adam, data=0), path, name)  # type: ignore[arg-type]
    forge(path, groups=document["groups"], parameters={"last.weight": {"exp_avg": 3}})
    refused(Run(model=run.model, optimizer=adam, data=0), path, "'exp_avg' of")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"global_samples": value} for value in WRONG_COUNTS),
        {"skipped_steps": -1},
        {"scheduler": [1]},
        *({"loss_scale": {"cur_scale": value}} for value in ("a", 0, -1.0, True, float("inf"))),
        *({"loss_scale": {"cur_iter": value}} for value in ("a", -2, 10**30, 0.5)),
        {"loss_scale": {"__class__": 1}},
    ],
)
def test_what_an_engine_counts_is_checked(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "global_samples": 3,
        "skipped_steps": 0,
        "scheduler": {"last_batch_iteration": 2},
        "loss_scale": {"cur_scale": 2.0, "cur_iter": 3, "last_overflow_iter": -1},
    }

    def read(facts: dict[str, Any]) -> Any:
        extra: Any = {"deepspeed": facts}
        return facts_in(Manifest(step=1, files={}, tensors={}, facts={"extra": extra}))

    assert read(good).global_samples == 3
    with pytest.raises(ValueError, match=next(iter(wrong))):
        read({**good, **wrong})


# ---- types and sizes of files


def _unlisted(path: Path) -> None:
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    forge(path, files={name: facts for name, facts in files.items() if name != ".metadata"})


def _fifo_unlisted(path: Path) -> None:
    _unlisted(path)
    (path / ".metadata").unlink()
    os.mkfifo(path / ".metadata")


def _fifo(path: Path) -> None:
    (path / ".metadata").unlink()
    os.mkfifo(path / ".metadata")


def _holes(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with (path / name).open("r+b") as stream:
            stream.truncate(1 << 40)  # no disk is used

    return make


def _large_data(path: Path) -> None:
    """A file of 1 TB, as the manifest says: to hash it would take half an hour."""
    _holes("__0_0.distcp")(path)
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    files["__0_0.distcp"]["bytes"] = 1 << 40
    forge(path, files=files)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "metadata that no hash stands for": (_unlisted, "lacks '.metadata'"),
    "a FIFO that the manifest does not list": (_fifo_unlisted, "lacks '.metadata'"),
    "a FIFO": (_fifo, r"\.metadata' is missing"),
    "a manifest of 1 TB": (_holes("manifest.json"), r"manifest.json' has 1099511627776 bytes"),
    "metadata of 1 TB": (_holes(".metadata"), r"\.metadata' has 1099511627776 bytes"),
    "data of 1 TB": (_large_data, r"__0_0\.distcp' has 1099511627776 bytes, its boxes"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_of_other_types_and_sizes_are_refused_before_they_are_opened(
    what: str, saved: tuple[Run, Path], tmp_path: Path
) -> None:
    run, path = saved
    change, said = FILES[what]
    change(path)
    refused(run, path, said)
    if what == "a manifest of 1 TB":
        refused(run, path.parent, said)
    with pytest.raises(ValueError, match=said):
        convert(path, tmp_path / "file.pt")
