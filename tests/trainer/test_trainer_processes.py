# SPDX-License-Identifier: Apache-2.0
"""Runs on several processes: the same gradient, the same curve, counted bytes, clean ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist.checkpoint import latest
from flora_dist.checkpoint.folder import read_manifest
from flora_dist.trainer.backend import spread
from flora_dist.trainer.config import Config
from flora_dist.trainer.loop import accumulate
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from tests.trainer.ragged import MICRO_BATCH, micro_batches, tiny_model, token_count, whole_batch
from tests.trainer.support import (
    Workers,
    metrics,
    output_of,
    tensor_hashes,
    tiny_overrides,
    torchrun,
)

LAYOUTS = [(2, "ddp"), (2, "fsdp1"), (2, "fsdp2"), (4, "hsdp")]
ALONE = World(process_rank=0, size=1, device=torch.device("cpu"))

# Float32 sums of a few thousand terms in another order: about 1e-7 x sqrt(1e3), relative to the
# gradient of the whole model.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """The gradient of the mean over all labels of the ragged batch, as torch itself gives it."""
    from flora_dist.trainer.configfile import load_config
    from tests.trainer.support import TINY

    model = tiny_model(load_config(TINY))
    inputs, labels = whole_batch()
    logits = model(input_ids=inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, all parameters together."""
    assert got.keys() == expected.keys()
    difference = sum(float((got[n] - expected[n]).square().sum()) for n in expected)
    return float((difference / sum(float(g.square().sum()) for g in expected.values())) ** 0.5)


def test_accumulated_ragged_micro_batches_give_the_mean_over_all_labels(
    whole: dict[str, torch.Tensor], tiny: Callable[..., Config]
) -> None:
    model = tiny_model(tiny())
    total = accumulate(spread(model, tiny(), ALONE), micro_batches(0, 1), token_count(), ALONE)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance(got, whole) < TOLERANCE
    inputs, labels = whole_batch()
    with torch.no_grad():
        logits = model(input_ids=inputs, use_cache=False).logits
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(total) / token_count() == pytest.approx(float(mean), rel=1e-6)


@pytest.mark.parametrize(("size", "name"), LAYOUTS)
def test_every_layout_has_the_gradient_of_one_process_on_the_whole_batch(
    size: int, name: str, workers: Workers, whole: dict[str, torch.Tensor]
) -> None:
    saved = torch.load(workers(size) / f"{name}.gradients.pt", weights_only=True)
    assert distance(saved["weighted"], whole) < TOLERANCE
    # The mutation: each process's own mean, averaged. The test must be able to see it.
    assert distance(saved["unweighted"], whole) > 1000 * TOLERANCE


@pytest.mark.parametrize(("size", "name"), LAYOUTS)
def test_every_layout_has_the_loss_curve_of_one_process(
    size: int, name: str, workers: Workers, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    assert run(tiny()) == 0
    got, expected = metrics(workers(size) / name), metrics(tmp_path / "tiny")
    for key in ("step", "tokens", "lr"):
        assert [r[key] for r in got] == [r[key] for r in expected]
    # AdamW divides by sqrt(v): rounding in weights with a tiny gradient is a step of size lr, so
    # losses agree to about lr x 1e-2, not to rounding; a wrong batch differs by 0.05 and more.
    for key in ("loss", "validation_loss"):
        assert [r.get(key) for r in got] == pytest.approx([r.get(key) for r in expected], abs=1e-4)


def padded_bytes(weights: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Bytes of the layers and of the rest, rows rounded up to an even number as FSDP2 does."""
    layers = root = 0
    for name, weight in weights.items():
        size = 4 * 2 * -(-len(weight) // 2) * weight[0].numel()
        layers, root = (layers + size, root) if ".layers." in name else (layers, root + size)
    return layers, root


def test_ddps_bytes_are_one_all_reduce_of_the_gradients(workers: Workers) -> None:
    saved = torch.load(workers(2) / "ddp.gradients.pt", weights_only=True)
    gradients = sum(g.numel() * 4 for g in saved["weighted"].values())
    assert saved["bytes_sent"] == 2 * gradients // 2  # 2 (w-1)/w at w = 2


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_fsdps_bytes_are_its_gathers_and_one_reduce_scatter(name: str, workers: Workers) -> None:
    saved = torch.load(workers(2) / f"{name}.gradients.pt", weights_only=True)
    layers, root = padded_bytes(saved["weighted"])
    if name == "fsdp1":  # cuts flat parameters, which are even here, not rows
        layers, root = (
            sum(4 * g.numel() for n, g in saved["weighted"].items() if (".layers." in n) == inside)
            for inside in (True, False)
        )
    micro = 8 // 2 // MICRO_BATCH
    # Each micro-batch gathers a layer for forward and again for backward, the root once.
    gathers = micro * (2 * layers + root)
    assert saved["bytes_sent"] == (gathers + layers + root) // 2


def test_hsdps_bytes_are_its_gathers_a_reduce_scatter_and_an_all_reduce(workers: Workers) -> None:
    saved = torch.load(workers(4) / "hsdp.gradients.pt", weights_only=True)
    layers, root = padded_bytes(saved["weighted"])
    micro = 8 // 4 // MICRO_BATCH
    within = (micro * (2 * layers + root) + layers + root) // 2
    across = 2 * ((layers + root) // 2) // 2  # each shard, half of the whole, over two groups
    assert saved["bytes_sent"] == within + across


def test_clipping_on_fsdp2_is_clipping_on_one_process_and_its_norm_is_counted(
    workers: Workers, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    assert run(tiny("train.max_grad_norm=0.1")) == 0
    got, expected = metrics(workers(2) / "clipped"), metrics(tmp_path / "tiny")
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in expected], abs=1e-4)
    sent = {
        name: json.loads((workers(2) / name / "summary.json").read_text())["measured"]["bytes_sent"]
        for name in ("fsdp2", "clipped")
    }
    # torch all-reduces one float32 norm for each of the 21 parameters; 2 (w-1)/w is 1 here
    assert sent["clipped"] - sent["fsdp2"] == 4 * 21


def test_a_whole_step_adds_the_token_count_to_the_gradients_bytes(workers: Workers) -> None:
    summary = json.loads((workers(2) / "ddp" / "summary.json").read_text())
    # four int64: the labels that count, who got a SIGINT or a SIGTERM, and whose loss is not finite
    assert summary["measured"]["bytes_sent"] == 4 * summary["parameters"] + 32


def test_state_bytes_are_the_largest_processs(workers: Workers) -> None:
    summary = json.loads((workers(2) / "fsdp2" / "summary.json").read_text())
    # Process 0 holds 129 of the 257 rows of embedding and head, and half of all else; two moments,
    # and a step count for each of the 21 parameters.
    held = summary["parameters"] // 2 + 32
    assert summary["measured"]["state_bytes"] == 8 * held + 4 * 21
    assert summary["measured"]["weight_bytes"] == 4 * held


@pytest.mark.parametrize("name", ["fsdp2", "ddp", "fsdp1", "fsdp2.low", "compressed"])
def test_resuming_on_two_processes_repeats_the_uninterrupted_run_bit_for_bit(
    name: str, workers: Workers
) -> None:
    whole, again = (metrics(workers(2, "saved") / f"{name}.{how}") for how in ("whole", "resumed"))
    kept = ("step", "loss", "validation_loss", "lr", "tokens")
    assert [[r.get(k) for k in kept] for r in again] == [
        [r.get(k) for k in kept] for r in whole[2:]
    ]
    # Weights and state of the last step, by the hashes of their files.
    files = [
        tensor_hashes(workers(2, "saved") / f"{name}.{how}" / "checkpoints" / "step-00000006")
        for how in ("whole", "resumed")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["ddp", "fsdp1"])
def test_a_run_of_two_processes_goes_on_with_one(
    name: str, workers: Workers, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    checkpoint = workers(2, "saved") / f"{name}.whole" / "checkpoints" / "step-00000002"
    flora = "optimizer={name: flora, lr: 1e-2, rank: 8}"
    assert run(tiny(flora, f"checkpoint.resume={checkpoint}")) == 0
    whole = metrics(workers(2, "saved") / f"{name}.whole")
    # float32 sums in another order through four steps; Flora divides by means, not by elements.
    assert [r["loss"] for r in metrics(tmp_path / "tiny")] == pytest.approx(
        [r["loss"] for r in whole[2:]], rel=1e-5
    )


def test_processes_that_find_different_checkpoints_are_told_so(workers: Workers) -> None:
    folder = workers(2, "saved")
    for rank in (0, 1):
        said = (folder / f"starts.{rank}").read_text()
        assert "they found some after 0 and some after 10 steps" in said


def test_ctrl_c_on_one_process_ends_all_of_them_cleanly(workers: Workers) -> None:
    folder = workers(2, "saved")
    assert [(folder / f"interrupted.{rank}").read_text() for rank in (0, 1)] == ["130", "130"]
    check_interrupted(folder / "interrupted")
    check_saved(folder / "interrupted")


def test_sigterm_on_one_process_saves_on_all_of_them_and_all_exit_with_0(workers: Workers) -> None:
    folder = workers(2, "saved")
    assert [(folder / f"preempted.{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    check_interrupted(folder / "preempted")
    check_saved(folder / "preempted")


def check_saved(folder: Path) -> None:
    """The one checkpoint is that of the last step taken."""
    newest = latest(folder / "checkpoints")
    assert newest is not None
    assert read_manifest(newest).step == metrics(folder)[-1]["step"]


def check_interrupted(folder: Path) -> None:
    records = metrics(folder)  # every line is whole
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["measured"]["finished"] is False
    assert summary["measured"]["steps"] == records[-1]["step"] < 100_000
    assert summary["adamw"] is None
    assert (folder / "summary.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not [p for p in folder.rglob("*") if "partial" in p.name]


def test_under_torchrun_only_process_0_speaks_and_ctrl_c_on_torchrun_writes_everything(
    corpus: Path, tmp_path: Path
) -> None:
    overrides = tiny_overrides(
        corpus, tmp_path, "backend.name=fsdp2", "train.steps=100000", "output.progress=true"
    )
    process = torchrun(2, tmp_path / "logs", *overrides)
    log = tmp_path / "tiny" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 90
        while (not log.exists() or log.read_text().count("\n") < 2) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    check_interrupted(tmp_path / "tiny")
    assert "41,696 parameters" in output_of(tmp_path / "logs", 0)
    assert output_of(tmp_path / "logs", 1) == ""


def test_under_torchrun_a_wrong_mesh_is_said_once_and_leaves_nothing(
    corpus: Path, tmp_path: Path
) -> None:
    hsdp = "backend={name: hsdp, replicate: 2, shard: 2}"
    overrides = tiny_overrides(corpus, tmp_path / "runs", hsdp)
    process = torchrun(2, tmp_path / "logs", *overrides)
    process.communicate(timeout=90)
    assert process.returncode != 0
    said = output_of(tmp_path / "logs", 0)
    assert said.startswith("error: the hsdp mesh must hold every process")
    assert output_of(tmp_path / "logs", 1) == ""
    assert not (tmp_path / "runs").exists()
