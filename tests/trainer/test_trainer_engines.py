# SPDX-License-Identifier: Apache-2.0
"""FSDP1 and DeepSpeed under the trainer: one process's curve, counted bytes, real launchers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.run import run
from tests.conftest import launched_pool_of
from tests.trainer.engine_runs import (
    gradient_norm,
    saved_and_resumed,
    steps_as_it_stands,
    trained,
)
from tests.trainer.ragged import tiny_model, whole_batch
from tests.trainer.support import (
    ENVIRONMENT,
    ROOT,
    TINY,
    deepspeed_launch,
    metrics,
    output_of,
    tiny_overrides,
    torchrun,
)

JSONS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
FLORA = "optimizer={name: flora, lr: 1e-2, rank: 8}"
ADAMW = "compare={name: adamw, lr: 1e-2}"
CLIPPED = "train.max_grad_norm=0.1"
# float32 sums in another order, 6e-8 each, through six steps. Flora divides by means over rows and
# columns, not element by element, so rounding stays rounding.
TOLERANCE = 1e-5


def zero(stage: str, *changes: str) -> list[str]:
    """Overrides: a config of the repository, whose values for use by itself are left out."""
    dropped = ("optimizer", "train_micro_batch_size_per_gpu", "bf16", "gradient_clipping")
    laid_over = ", ".join([*(f"{key}: null" for key in dropped), *changes])
    path = f"config: {ROOT / 'configs' / 'deepspeed' / stage}.json"
    return [f"backend={{name: deepspeed, {path}, changes: {{{laid_over}}}}}"]


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [r[key] for r in records for key in ("loss", "validation_loss") if key in r]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process: Flora, clipped and not, and clipped AdamW."""
    folder = tmp_path_factory.mktemp("alone")
    for name, overrides in {"free": [FLORA], "clipped": [FLORA, ADAMW, CLIPPED]}.items():
        every = tiny_overrides(corpus, folder, f"output.name={name}", *overrides)
        assert run(load_config(TINY, every)) == 0
    return {
        "free": losses(metrics(folder / "free")),
        "clipped": losses(metrics(folder / "clipped")),
        "adamw": losses(metrics(folder / "clipped" / "compare")),
    }


def check_curves(folder: Path, alone: dict[str, list[float]]) -> None:
    assert losses(metrics(folder)) == pytest.approx(alone["clipped"], rel=TOLERANCE)
    # Not clipping must be seen: it moves some loss by many tolerances.
    moved = [abs(a - b) / b for a, b in zip(alone["free"], alone["clipped"], strict=True)]
    assert max(moved) > 10 * TOLERANCE
    # AdamW divides each element by its own root: rounding of a tiny one is a step of size lr.
    assert losses(metrics(folder / "compare")) == pytest.approx(alone["adamw"], abs=1e-4)


def test_fsdp1_under_torchrun_has_the_clipped_curves_of_one_process(
    corpus: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    overrides = tiny_overrides(corpus, tmp_path, "backend.name=fsdp1", FLORA, ADAMW, CLIPPED)
    process = torchrun(2, tmp_path / "logs", *overrides)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said + output_of(tmp_path / "logs", 0)
    check_curves(tmp_path / "tiny", alone)
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    # Flat parameters are halved exactly: their numbers of elements are even.
    assert summary["adamw"]["weight_bytes"] == 4 * summary["parameters"] // 2
    assert summary["measured"]["adamw_bytes"] == 8 * summary["parameters"] // 2
    assert summary["measured"]["state_bytes"] < summary["parameters"] // 2


@pytest.mark.deepspeed
def test_deepspeeds_launcher_trains_with_the_clipped_curves_of_one_process(
    corpus: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    overrides = tiny_overrides(corpus, tmp_path, *zero("zero2"), FLORA, ADAMW, CLIPPED)
    code = deepspeed_launch(2, tmp_path / "logs", *overrides)
    said = [next((tmp_path / "logs").glob(f"*_rank{rank}.log")).read_text() for rank in (0, 1)]
    assert code == 0, said[0]
    check_curves(tmp_path / "tiny", alone)
    assert "41,696 parameters" in said[0]
    assert said[1] == ""


# By default under torchrun (test_trainer_processes.py): who speaks hangs on the rank alone, and the
# refusal itself is that of test_trainer_refusals.py.
@pytest.mark.slow
@pytest.mark.deepspeed
def test_under_deepspeeds_launcher_a_mistake_is_said_once_and_leaves_nothing(
    corpus: Path, tmp_path: Path
) -> None:
    overrides = tiny_overrides(corpus, tmp_path / "runs", *zero("zero2", "zero_optimisation: {}"))
    assert deepspeed_launch(2, tmp_path / "logs", *overrides) != 0
    said = [next((tmp_path / "logs").glob(f"*_rank{rank}.log")).read_text() for rank in (0, 1)]
    assert said[0].startswith("error: DeepSpeed knows no key 'zero_optimisation'")
    assert said[1] == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.deepspeed
def test_deepspeed_runs_on_one_process_without_a_launcher(
    corpus: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    overrides = tiny_overrides(corpus, tmp_path, *zero("zero2"), FLORA)
    command = [sys.executable, "-m", "flora_dist.trainer", "--config", str(TINY)]
    command += [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(metrics(tmp_path / "tiny")) == pytest.approx(alone["free"], rel=TOLERANCE)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3", "zero3_offload"])
def test_every_stage_has_the_curve_of_one_process_and_measures_its_tensors(
    stage: str, corpus: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    # Losses in chunks of 10 of 64 tokens are those of whole logits.
    overrides = tiny_overrides(corpus, tmp_path, *zero(stage), FLORA, "model.loss_chunk=10")
    each = launched_pool_of(2)(trained, overrides)
    assert losses(each[0]["records"]) == pytest.approx(alone["free"], rel=TOLERANCE)
    for found in each:
        assert found["state_bytes"] == max(one["reported"] for one in each)
        weights, share = 4 * 41_696, 1 if stage == "zero0" else 2
        # Stages 1 and 2 keep whole weights, 3 a part; all of them float32 masters of their part.
        whole = weights // 2 if stage.startswith("zero3") else weights
        masters = 0 if stage == "zero0" else weights // 2
        assert found["weight_bytes"] == whole + masters
        assert found["adamw_bytes"] == 2 * weights // share


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("stage", "gradients", "gathers"),
    # Of all weights: two micro-batches, reduced at the boundary or, from stage 2 on, each; stage 2
    # by an all-reduce (2 (w-1)/w is 1 here), stage 3 by a reduce-scatter. The weights are gathered
    # after the step, in stage 3 too: all of them are below its persistence threshold.
    [("zero0", 1.0, 0.0), ("zero1", 1.0, 0.5), ("zero2", 2.0, 0.5), ("zero3", 1.0, 0.5)],
)
def test_deepspeeds_bytes_are_its_reductions_and_its_gathers(
    stage: str, gradients: float, gathers: float, corpus: Path, tmp_path: Path
) -> None:
    overrides = tiny_overrides(corpus, tmp_path, *zero(stage), "train.steps=3")
    found = launched_pool_of(2)(trained, overrides)[0]
    # The loop's four int64; one float32 for the norm, in stage 3 another for overflow.
    small = 32 + {"zero0": 0, "zero1": 4, "zero2": 4, "zero3": 8}[stage]
    assert found["bytes_sent"] == 4 * 41_696 * (gradients + gathers) + small


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_the_engine_finds_the_norm_of_one_process_on_the_whole_ragged_batch(
    stage: str, corpus: Path, tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    model = tiny_model(tiny())
    inputs, labels = whole_batch()
    logits = model(input_ids=inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    # Flora and AdamW hardly see a factor in the gradient; the norm is where a wrong one shows.
    overrides = tiny_overrides(corpus, tmp_path, *zero(stage), FLORA, "train.micro_batch=1")
    norms = launched_pool_of(2)(gradient_norm, overrides)
    assert norms == pytest.approx([expected] * 2, rel=TOLERANCE)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2"])
def test_bfloat16_is_deepspeeds_bf16_and_stays_close(
    stage: str, corpus: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    overrides = [*zero(stage), FLORA, "train.precision=bfloat16"]
    found = launched_pool_of(2)(trained, tiny_overrides(corpus, tmp_path, *overrides))[0]
    # 8 bits: 0.4 % of a logit of size 1, averaged over 256 tokens; weights and gradients too.
    assert losses(found["records"]) == pytest.approx(alone["free"], abs=0.03)
    assert losses(found["records"]) != pytest.approx(alone["free"], abs=1e-4)
    masters = 4 * 41_696 // (1 if stage == "zero0" else 2)
    assert found["weight_bytes"] == 2 * 41_696 + masters


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_bfloat16_pure_has_no_masters_and_stays_close(
    stage: str, corpus: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    overrides = [*zero(stage), FLORA, "train.precision=bfloat16-pure"]
    found = launched_pool_of(2)(trained, tiny_overrides(corpus, tmp_path, *overrides))[0]
    # 8 bits: 0.4 % of a logit of size 1, averaged over 256 tokens; weights and gradients too.
    assert losses(found["records"]) == pytest.approx(alone["free"], abs=0.03)
    assert losses(found["records"]) != pytest.approx(alone["free"], abs=1e-4)
    assert found["weight_bytes"] == 2 * 41_696 // (2 if stage == "zero3" else 1)


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "precision"), [("zero2", "float32"), ("zero3", "bfloat16")])
def test_an_engine_resumes_bit_for_bit_and_one_process_goes_on_from_it(
    stage: str, precision: str, corpus: Path, tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    overrides = [*zero(stage), FLORA, CLIPPED, f"train.precision={precision}"]
    overrides = tiny_overrides(corpus, tmp_path, *overrides)
    for whole, resumed in launched_pool_of(2)(saved_and_resumed, overrides, str(tmp_path)):
        assert losses(resumed[0]) == losses([r for r in whole[0] if r["step"] > 2])
        assert resumed[1] == whole[1]
    checkpoint = f"checkpoint.resume={tmp_path / 'whole' / 'step-00000002'}"
    assert run(tiny(FLORA, CLIPPED, f"train.precision={precision}", checkpoint)) == 0
    # 8 bits: 0.4 % of a logit of size 1, averaged over 256 tokens.
    tolerance = {"rel": TOLERANCE} if precision == "float32" else {"abs": 0.03}
    rest = losses([r for r in whole[0] if r["step"] > 2])
    assert losses(metrics(tmp_path / "tiny")) == pytest.approx(rest, **tolerance)


@pytest.mark.deepspeed
@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_every_json_of_the_repository_trains_as_it_stands(path: Path) -> None:
    each = launched_pool_of(2)(steps_as_it_stands, str(path))
    for (before, after), name in each:
        assert after < before
        assert name == "Flora"
