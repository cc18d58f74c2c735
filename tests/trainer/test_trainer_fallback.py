# SPDX-License-Identifier: Apache-2.0
"""`checkpoint.resume: auto` where the newest checkpoint is damaged: what is taken, what refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.run import run
from tests.trainer.support import TINY, Workers, metrics, tensor_hashes, tiny_overrides

Tiny = Callable[..., Config]
FLORA = "optimizer={name: flora, lr: 1e-2}"
AUTO = "checkpoint={every: 2, resume: auto, keep: null}"


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing happened to, with its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(load_config(TINY, tiny_overrides(corpus, folder, FLORA, AUTO))) == 0
    return folder / "tiny"


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The checkpoints of that run as a kill behind step 5 leaves them: of steps 2 and 4."""
    folder = tmp_path / "tiny"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    point_at(folder / "checkpoints", 4)
    return folder / "checkpoints"


def point_at(checkpoints: Path, step: int) -> None:
    tag = f"step-{step:08d}"
    digest = hashlib.sha256((checkpoints / tag / "manifest.json").read_bytes()).hexdigest()
    (checkpoints / "latest").write_text(f"{tag}\n{digest}\n")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = ("manifest.json", ".metadata", "__0_0.distcp")
DAMAGES = {"flipped": flip, "torn": tear, "gone": Path.unlink}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_goes_on(
    damage: str, name: str, cut: Path, whole: Path, tiny: Tiny
) -> None:
    # Most of these ended every requeue with exit code 2, although `keep` promised otherwise.
    file = cut / "step-00000004" / name
    DAMAGES[damage](file)
    with pytest.warns(UserWarning, match="Going on from the one before") as warned:
        assert run(tiny(FLORA, AUTO)) == 0
    (said,) = (str(each.message) for each in warned if "Going on" in str(each.message))
    assert str(file) in said
    assert str(cut / "step-00000002") in said
    kept = ("step", "loss", "lr", "validation_loss", "tokens")
    curves = [
        [[r.get(key) for key in kept] for r in metrics(folder)] for folder in (cut.parent, whole)
    ]
    assert curves[0] == curves[1]
    # The damaged one was written anew on the way.
    for step in (4, 6):
        again, first = (folder / f"step-0000000{step}" for folder in (cut, whole / "checkpoints"))
        assert tensor_hashes(again) == tensor_hashes(first)


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone"])
def test_a_damaged_latest_costs_no_checkpoint(
    damage: str, cut: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](cut / "latest")
    with pytest.warns(UserWarning, match="latest"):
        assert run(tiny(FLORA, AUTO)) == 0
    assert f"going on from {cut / 'step-00000004'}" in capsys.readouterr().out


def test_two_damaged_ones_are_both_passed_over(
    cut: Path, whole: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "checkpoints" / "step-00000006", cut / "step-00000006")
    point_at(cut, 6)
    tear(cut / "step-00000006" / "manifest.json")
    flip(cut / "step-00000004" / "__0_0.distcp")
    with pytest.warns(UserWarning, match="Going on from the one before"):
        assert run(tiny(FLORA, AUTO)) == 0
    assert f"going on from {cut / 'step-00000002'}" in capsys.readouterr().out


def test_where_no_manifest_is_whole_the_run_does_not_start_over(cut: Path, tiny: Tiny) -> None:
    for step in (2, 4):
        flip(cut / f"step-0000000{step}" / "manifest.json")
    before = metrics(cut.parent)
    with pytest.raises(ValueError, match=r"none to fall back to: .*step-00000004"):
        run(tiny(FLORA, AUTO))
    assert metrics(cut.parent) == before


def test_where_files_of_all_are_damaged_the_run_does_not_start_over(cut: Path, tiny: Tiny) -> None:
    for step in (2, 4):
        flip(cut / f"step-0000000{step}" / "__0_0.distcp")
    before = metrics(cut.parent)
    with (
        pytest.warns(UserWarning, match=r"step-00000004.*Going on from the one before"),
        pytest.raises(ValueError, match=r"none to fall back to: .*step-00000002"),
    ):
        run(tiny(FLORA, AUTO))
    assert metrics(cut.parent) == before


def test_a_torn_manifest_does_not_open_the_way_to_another_runs_checkpoint(
    cut: Path, tiny: Tiny
) -> None:
    tear(cut / "step-00000004" / "manifest.json")
    with pytest.raises(ValueError, match=r"step-00000002' differs: seed was 0, is 1"):
        run(tiny(FLORA, AUTO, "train.seed=1"))


def test_a_damaged_file_of_another_runs_checkpoint_is_not_passed_over(
    cut: Path, tiny: Tiny
) -> None:
    flip(cut / "step-00000004" / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"step-00000004' differs: seed was 0, is 1"):
        run(tiny(FLORA, AUTO, "train.seed=1"))


def test_a_checkpoint_of_a_newer_program_is_not_passed_over(cut: Path, tiny: Tiny) -> None:
    file = cut / "step-00000004" / "manifest.json"
    document = json.loads(file.read_bytes()) | {"version": 2}
    del document["sha256"]
    rest = b'",\n' + json.dumps(document).encode()[1:] + b"\n"
    digest = hashlib.sha256(rest).hexdigest().encode()
    file.write_bytes(b'{"sha256": "' + digest + rest)
    point_at(cut, 4)
    with pytest.raises(ValueError, match=r"'version' is 2, .* Upgrade it"):
        run(tiny(FLORA, AUTO))


def test_a_checkpoint_named_by_hand_is_not_taken_for_a_newer_one(cut: Path, tiny: Tiny) -> None:
    (cut / "latest").write_text("step-00000002")
    flip(cut / "step-00000002" / "manifest.json")
    with pytest.raises(ValueError, match=r"none to fall back to: .*step-00000002"):
        run(tiny(FLORA, AUTO))


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(cut: Path, tiny: Tiny) -> None:
    file = cut / "step-00000004" / "__0_0.distcp"
    flip(file)
    for path in (cut, cut / "step-00000004"):
        with pytest.raises(ValueError, match=file.name):
            run(tiny(FLORA, f"checkpoint={{every: 2, resume: {path}}}"))


def test_a_file_that_one_process_alone_finds_damaged_makes_all_of_them_fall_back(
    workers: Workers,
) -> None:
    folder = workers(2, "saved")
    for rank in (0, 1):
        said = (folder / f"damaged.{rank}").read_text()
        assert said.startswith("0 ")
        # Process 0 alone warns.
        assert ("Going on from the one before" in said) == (rank == 0)
    assert [record["step"] for record in metrics(folder / "damaged")] == [1, 2, 3, 4, 5, 6]
