# SPDX-License-Identifier: Apache-2.0
"""Damaged, swapped, half-written and forged checkpoints: refused by name, or loaded bit for bit."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flora_dist import Flora, checkpoint
from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.folder import hash_files, read_manifest, tag_of
from tests.checkpoint.damage import FAULTS, NEWEST, PREVIOUS, strike
from tests.checkpoint.small import SETTINGS, Run, Small, start
from tests.checkpoint.test_manifest import forge
from tests.checkpoint.verdict import BAD, REFUSED, WRONG, Verdict
from tests.conftest import pool_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes that are killed: sums of several threads need not be theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bad(verdicts: list[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.found in BAD]


def test_random_faults_load_nothing_wrong_and_lose_no_previous_one() -> None:
    verdicts = strike(25, seed=1)
    assert bad(verdicts) == []
    assert {v.kind for v in verdicts if v.found == REFUSED} == set(FAULTS)


@pytest.mark.slow
def test_two_hundred_random_faults_load_nothing_wrong_and_lose_no_previous_one() -> None:
    assert bad(strike(200, seed=0)) == []


def test_faults_tell_of_files_that_are_not_hashed() -> None:
    with patch.object(folders, "verify_files", lambda *_, **__: None):
        # Most flips hit torch's headers and padding, which its own reader checks or skips.
        verdicts = strike(64, seed=2, kinds=("flip",)) + strike(12, seed=2, kinds=("swap",))
    assert {v.kind for v in verdicts if v.found == WRONG} == {"flip", "swap"}


def test_faults_tell_of_a_latest_that_names_no_digest() -> None:
    original = folders.read_pointer

    def without_digest(folder: Path) -> Any:
        found = original(folder)
        return found and replace(found, digest="")

    with patch.object(folders, "read_pointer", without_digest):
        verdicts = strike(16, seed=3, kinds=("swap",))
    assert WRONG in {v.found for v in verdicts if tag_of(NEWEST) in v.what}


# ---- ranks together


def sharded(data: int) -> Run:
    model = fully_shard(Small(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    # After sharding: it swaps the parameters, and an optimizer of the old ones trains nothing.
    return Run(model=model, optimizer=Flora(model.named_parameters(), **SETTINGS), data=data)


def faults_on_two_ranks(home: Path, seeds: range) -> list[tuple[str, str, bool, bool]]:
    """Of each fault: what it was, what loading said, whether state and previous one held."""
    running, previous = sharded(3), None
    for number, name in enumerate(("ours", "theirs")):
        run = sharded(number)
        for step in range(1, NEWEST + 1):
            run.train([step])
            if step in (PREVIOUS, NEWEST):
                checkpoint.save(home / name, run.model, run.optimizer, step=step)
                if name == "ours" and step == PREVIOUS:
                    previous = run.state()
    running.train([1])
    found = []
    for seed in seeds:
        copy = home / f"{seed}"
        what = [_damaged(home, copy, seed)] if dist.get_rank() == 0 else [""]
        dist.broadcast_object_list(what)
        before, said = running.state(), ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checkpoint.load(copy / "ours", running.model, running.optimizer)
        except ValueError as error:
            said = str(error)
        held = not said or running.state() == before
        checkpoint.load(copy / "ours" / tag_of(PREVIOUS), running.model, running.optimizer)
        found.append((what[0], said, held, running.state() == previous))
        running.train([NEWEST + 1])
    return found


def _damaged(home: Path, copy: Path, seed: int) -> str:
    for name in ("ours", "theirs"):
        shutil.copytree(home / name, copy / name)
    kind = list(FAULTS)[seed % len(FAULTS)]
    return FAULTS[kind](copy / "ours", copy / "theirs", random.Random(seed)).what


@pytest.mark.ranks(2)
def test_ranks_refuse_together_and_keep_their_states(tmp_path: Path) -> None:
    first, second = pool_of(2)(faults_on_two_ranks, tmp_path, range(12))
    assert sum(bool(said) for _, said, _, _ in first) > 8
    for (what, said, held, loads), (_, others, its_held, its_loads) in zip(
        first, second, strict=True
    ):
        assert said.partition(" (found on rank")[0] == others.partition(" (found on rank")[0], what
        assert (held, its_held, loads, its_loads) == (True, True, True, True), what


# ---- pickles planted with hashes that fit


MARKER = "marker"


class Planted:
    """Pickled as a call that leaves a file."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


def zipped(pad: int = 0) -> bytes:
    """As torch saves today, and so many bytes more."""
    stream = io.BytesIO()
    torch.save({"w": Planted(), "pad": torch.zeros(pad, dtype=torch.uint8)}, stream)
    return stream.getvalue()


def legacy(pad: int = 0) -> bytes:
    """As torch saved before."""
    stream = io.BytesIO()
    content = {"w": Planted(), "pad": torch.zeros(pad, dtype=torch.uint8)}
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def bare(pad: int = 0) -> bytes:
    """No file of torch's."""
    return pickle.dumps((Planted(), bytes(pad)), protocol=2)


def plant(path: Path, name: str, content: bytes) -> None:
    """Put a file in a checkpoint, with its hash in the manifest and the manifest's own."""
    (path / name).write_bytes(content)
    facts = {n: asdict(f) for n, f in hash_files(path, read_manifest(path).files).items()}
    forge(path, files=facts)


def in_each_box(path: Path, make: Callable[[int], bytes]) -> None:
    """A data file that holds a planted one for each box, as long as the box."""
    metadata, content = pickle.loads((path / ".metadata").read_bytes()), b""
    for index, place in metadata.storage_data.items():
        stored = metadata.state_dict_metadata[index.fqn]
        (chunk,) = [each for each in stored.chunks if each.offsets == index.offset]
        made = make(chunk.sizes.numel() * stored.properties.dtype.itemsize)
        place.offset, place.length = len(content), len(made)
        content += made
    plant(path, ".metadata", pickle.dumps(metadata))
    plant(path, "__0_0.distcp", content)


PLANTS: dict[str, Callable[[Path], None]] = {
    "metadata": lambda path: plant(path, ".metadata", pickle.dumps(Planted())),
    "data, zipped": lambda path: in_each_box(path, zipped),
    "data, legacy": lambda path: in_each_box(path, legacy),
    "data, a bare pickle": lambda path: in_each_box(path, bare),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_pickle_is_never_run_though_every_hash_fits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = start(data=0)
    run.train([1])
    path = checkpoint.save(tmp_path / "all", run.model, run.optimizer, step=1)
    run.train([2])
    PLANTS[name](path)
    before = run.state()
    with pytest.raises(ValueError, match=r"a checkpoint's (files|metadata) must be"):
        checkpoint.load(path, run.model, run.optimizer)
    assert not Path(MARKER).exists()
    assert run.state() == before


@pytest.mark.parametrize("content", [zipped, legacy])
def test_the_planted_pickle_does_run_where_it_is_trusted(
    content: Callable[[], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else its marker would prove nothing.
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(content()), weights_only=False)
    assert Path(MARKER).exists()


def test_the_hash_of_a_file_is_what_the_shell_computes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_files(tmp_path, ["x"])["x"].sha256 == hashlib.sha256(b"abc").hexdigest()
