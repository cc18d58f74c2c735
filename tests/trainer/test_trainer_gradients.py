# SPDX-License-Identifier: Apache-2.0
"""Runs whose gradients are kept as sketches: refusals, one curve on every layout, bytes, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist import cli
from flora_dist.trainer.config import Config, GradientsConfig
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.deepspeed_json import engine_settings
from flora_dist.trainer.run import run
from tests.conftest import launched_pool_of
from tests.trainer.engine_runs import trained
from tests.trainer.support import ROOT, TINY, Workers, metrics, tiny_overrides

Tiny = Callable[..., Config]
FLORA = "optimizer={name: flora, lr: 1e-2, rank: 8}"
CLIPPED = "train.max_grad_norm=0.1"
EVERY = "checkpoint={every: 2, keep: null}"
COMPRESSED = "gradients={level: compressed, bits: 32}"
"""In full: few bits are another run on another number of processes."""
LEVELS = ("sharded", "compressed", "fused")

# float32 sums in another order, 6e-8 each, through six steps; as for dense gradients under Flora.
TOLERANCE = 1e-5


def losses(folder: Path) -> list[float]:
    return [r[key] for r in metrics(folder) for key in ("loss", "validation_loss") if key in r]


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process, at level compressed but for the last: clipped, not, dense."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {"clipped": [COMPRESSED, CLIPPED], "free": [COMPRESSED], "dense": [CLIPPED]}
    for name, overrides in cases.items():
        every = tiny_overrides(corpus, folder, f"output.name={name}", FLORA, *overrides)
        assert run(load_config(TINY, every)) == 0
    return {name: losses(folder / name) for name in cases}


# ---- one run, whatever the layout and however the sketches come about


def test_what_the_curves_must_tell_apart_lies_far_apart(alone: dict[str, list[float]]) -> None:
    for other in ("free", "dense"):
        moved = [abs(a - b) / b for a, b in zip(alone[other], alone["clipped"], strict=True)]
        assert max(moved) > 100 * TOLERANCE


@pytest.mark.parametrize("level", ["sharded", "fused"])
def test_every_level_has_the_same_curve_on_one_process(
    level: str, tiny: Tiny, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    assert run(tiny(FLORA, CLIPPED, f"gradients.level={level}")) == 0
    assert losses(tmp_path / "tiny") == pytest.approx(alone["clipped"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        *[(2, f"ddp.{level}") for level in LEVELS[1:]],
        *[(2, f"fsdp2.{level}") for level in LEVELS],
        (4, "hsdp.compressed"),
    ],
)
def test_every_layout_has_the_clipped_curve_of_one_process(
    size: int, name: str, workers: Workers, alone: dict[str, list[float]]
) -> None:
    assert losses(workers(size) / name) == pytest.approx(alone["clipped"], rel=TOLERANCE)


def test_a_run_with_cpu_offload_has_the_losses_of_one_without(workers: Workers) -> None:
    kept = ("step", "tokens", "lr", "loss", "validation_loss", "grad_norm")
    got, expected = (metrics(workers(2) / name) for name in ("offloaded", "fsdp2.dense"))
    assert [[r.get(k) for k in kept] for r in got] == [[r.get(k) for k in kept] for r in expected]
    assert all(r["loss"] is not None for r in got)


def test_at_level_dense_flora_clips_on_fsdp2_as_on_one_process(
    workers: Workers, alone: dict[str, list[float]]
) -> None:
    assert losses(workers(2) / "fsdp2.dense") == pytest.approx(alone["dense"], rel=TOLERANCE)


def test_bfloat16_arithmetic_and_messages_stay_close(
    tiny: Tiny, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    low = ["train.precision=bfloat16", "gradients.wire_dtype=bfloat16", "backend.name=fsdp2"]
    assert run(tiny(FLORA, CLIPPED, COMPRESSED, *low)) == 0
    # As for dense gradients: 8 bits, 0.4 % of a logit of size 1, averaged over 256 tokens.
    assert losses(tmp_path / "tiny") == pytest.approx(alone["clipped"], abs=0.02)


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("stage", "level"),
    [("zero0", "compressed"), ("zero1", "fused"), ("zero2", "compressed"), ("zero3", "fused")],
)
def test_deepspeed_has_the_clipped_curve_of_one_process(
    stage: str, level: str, corpus: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    path = ROOT / "configs" / "deepspeed" / f"{stage}.json"
    dropped = ("optimizer", "train_micro_batch_size_per_gpu", "bf16", "gradient_clipping", "flora")
    changes = ", ".join(f"{key}: null" for key in dropped)
    backend = f"backend={{name: deepspeed, config: {path}, changes: {{{changes}}}}}"
    overrides = tiny_overrides(corpus, tmp_path, backend, FLORA, CLIPPED)
    overrides.append(f"gradients={{level: {level}, bits: 32}}")
    for found in launched_pool_of(2)(trained, overrides):
        curve = [r[k] for r in found["records"] for k in ("loss", "validation_loss") if k in r]
        assert curve == pytest.approx(alone["clipped"], rel=TOLERANCE)
        assert (found["gradients"]["sketched"], found["gradients"]["dense"]) == (16, 5)


# ---- bytes


def test_ddp_sends_the_sketches_once_a_step_beside_what_is_dense(workers: Workers) -> None:
    measured = summary_of(workers(2) / "ddp.compressed")["measured"]
    gradients = measured["gradients"]
    assert (gradients["level"], gradients["sketched"], gradients["dense"]) == ("compressed", 16, 5)
    # Blocks of 32 to 4 numbers, of 64 to 8: an eighth of the matrices; but 16 numbers for 88
    # columns of the two down projections, whose second block is ragged.
    sketches = 4 * ((41_696 - 5 * 32) // 8 + 2 * 32 * (16 - 11))
    assert gradients["held_bytes"] == gradients["sent_bytes"] == sketches
    # 2 (w-1)/w is 1 at w = 2. Beside them: whether each has a gradient, five norms of 32 weights,
    # and the loop's four int64; two micro-batches.
    assert measured["bytes_sent"] == gradients["sent_bytes"] + 4 * 16 + 4 * 5 * 32 + 32


def test_fused_sends_what_compressed_sends(workers: Workers) -> None:
    sent = [
        summary_of(workers(2) / f"{backend}.{level}")["measured"]["bytes_sent"]
        for backend in ("ddp", "fsdp2")
        for level in ("compressed", "fused")
    ]
    assert sent[0] == sent[1]
    assert sent[2] == sent[3]


def test_fsdp2_reduces_sketches_in_place_of_gradients(workers: Workers) -> None:
    dense, sharded, compressed = (
        summary_of(workers(2) / f"fsdp2.{level}")["measured"] for level in ("dense", *LEVELS[:2])
    )
    # Sharded: the same messages as dense, but for none of the norm of each parameter.
    assert sharded["bytes_sent"] == dense["bytes_sent"]
    assert dense["gradients"] is None
    # Half of each buffer travels: whole matrices (rows of 257 padded to 258) against an eighth,
    # whose lines begin with 16 flags.
    matrices = 41_696 - 5 * 32 + 2 * 32
    saved = dense["bytes_sent"] - compressed["bytes_sent"]
    assert saved == pytest.approx(4 * matrices * 7 / 8 / 2, rel=0.03)
    assert sharded["gradients"]["sent_bytes"] == 0
    assert 2 * sharded["gradients"]["held_bytes"] == pytest.approx(
        compressed["gradients"]["held_bytes"], rel=0.01
    )


def test_the_command_says_what_is_sketched(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", str(TINY)]
    for override in tiny_overrides(corpus, tmp_path, FLORA, COMPRESSED, "gradients.rank=2"):
        arguments += ["--set", override]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    gradients = summary_of(tmp_path / "tiny")["measured"]["gradients"]
    assert gradients["sent_bytes"] == 0
    line = f"gradients compressed, 16 of 21 parameters: {gradients['held_bytes']:,} bytes kept"
    assert line in said
    assert "sketches of them" in said
    assert load_config(tmp_path / "tiny" / "config.yaml").gradients == GradientsConfig(
        level="compressed", rank=2, bits=32
    )


def test_the_comparison_stays_dense(tiny: Tiny, tmp_path: Path) -> None:
    compare = "compare={name: adamw, lr: 1e-2}"
    assert run(tiny(FLORA, COMPRESSED, compare, CLIPPED)) == 0
    assert run(tiny("optimizer={name: adamw, lr: 1e-2}", CLIPPED, "output.name=adamw")) == 0
    assert losses(tmp_path / "tiny" / "compare") == losses(tmp_path / "adamw")
    assert summary_of(tmp_path / "tiny")["adamw"]["gradients"] is None


# ---- resume


@pytest.mark.parametrize("level", LEVELS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    level: str, tiny: Tiny, tmp_path: Path
) -> None:
    options = [FLORA, CLIPPED, f"gradients.level={level}", "schedule.warmup_steps=2"]
    assert run(tiny(*options, EVERY, "output.name=whole")) == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    assert run(tiny(*options, f"checkpoint.resume={checkpoint}", "output.name=rest")) == 0
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[2:]


def test_a_checkpoint_goes_on_at_another_level_of_sketches_but_not_dense(
    tiny: Tiny, tmp_path: Path
) -> None:
    options = [FLORA, CLIPPED]
    assert run(tiny(*options, COMPRESSED, EVERY, "output.name=whole")) == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    resume = [f"checkpoint.resume={checkpoint}", "output.name=rest"]
    assert run(tiny(*options, "gradients.level=fused", *resume)) == 0
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "rest") == pytest.approx(whole[2:], rel=TOLERANCE)
    with pytest.raises(ValueError, match=r"differs: gradients was 'sketched', is 'dense'"):
        run(tiny(*options, f"checkpoint.resume={checkpoint}", "output.name=other"))
    assert not (tmp_path / "other").exists()


# ---- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer={name: adamw, lr: 1e-2}"], r"needs Flora, .*'adamw' reads whole gradients"),
        (["optimizer={name: adafactor, lr: 1e-2}"], r"'adafactor' reads whole gradients"),
        (["backend.name=fsdp1"], r"FSDP1 reduces the flat gradient .* Set backend.name: fsdp2"),
        (["backend.name=ddp", "gradients.level=sharded"], r"ddp shards nothing"),
        (["gradients.rank=64"], r"gradients.rank does not fit .* rank must be below block"),
        (["optimizer.rank=null"], r"would keep every gradient dense: rank=None"),
        (["gradients.rank=40"], r"would keep every gradient dense: rank 20 per block of 32"),
    ],
    ids=str,
)
def test_what_cannot_be_sketched_is_refused_before_anything_is_written(
    overrides: list[str], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny(FLORA, COMPRESSED, *overrides))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("level: compresed", r"gradients.level must be one of .* Did you mean 'compressed'"),
        ("rank: 4", r"gradients.level='dense' keeps none; they are 4, None, None and 'float32'"),
        ("wire_dtype: bfloat16", r"gradients.level='dense' keeps none"),
        ("bucket_cap_mb: 1.0", r"cuts sketches into messages, and gradients.level='dense' keeps"),
        ("level: sharded, wire_dtype: bfloat16", r"no sketch travels"),
        ("level: fused, rank: 0", r"gradients.rank must be at least 1; it is 0"),
        ("level: fused, wire_dtype: float16", r"gradients.wire_dtype must be one of float32"),
    ],
)
def test_a_gradients_section_that_cannot_be_right_is_refused(
    section: str, message: str, tiny: Tiny
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(FLORA, f"gradients={{{section}}}")


@pytest.fixture
def flora_block(tiny: Tiny, tmp_path: Path) -> Callable[..., Any]:
    """What DeepSpeed gets as its "flora" block, for a block of the JSON and overrides."""

    def make(block: Any, *overrides: str) -> Any:
        path = tmp_path / "zero.json"
        path.write_text(json.dumps({} if block is None else {"flora": block}))
        backend = f"backend={{name: deepspeed, config: {path}}}"
        return engine_settings(tiny(backend, FLORA, *overrides), 2).get("flora")

    return make


def test_the_section_becomes_the_block_of_the_json(flora_block: Callable[..., Any]) -> None:
    full = {"gradients": "compressed", "gradient_rank": 4, "wire_dtype": "bfloat16"}
    level = "gradients.level=compressed"
    section = [level, "gradients.rank=4", "gradients.wire_dtype=bfloat16"]
    assert flora_block(None) is None
    assert flora_block({}) == flora_block({"gradients": "dense"}) == {"gradients": "dense"}
    assert flora_block(None, *section) == full
    assert flora_block({"gradients": "auto", "gradient_rank": 4}, *section) == full
    assert flora_block(full, *section) == full
    plain = {"gradients": "compressed", "wire_dtype": "float32"}
    assert flora_block({"gradients": "compressed"}, level) == plain


@pytest.mark.parametrize(
    ("block", "overrides", "message"),
    [
        ({"gradients": "compressed"}, [], r"is 'compressed', but gradients.level makes it 'dense'"),
        ({"gradients": "dense"}, [COMPRESSED], r"'flora.gradients' is 'dense', but gradients.lev"),
        ({"gradient_rank": 4}, [COMPRESSED], r"is 4, but gradients.rank makes it None"),
        ({"wire_dtype": "bfloat16"}, [COMPRESSED], r"but gradients.wire_dtype makes it 'float32'"),
        ({"gradient": "dense"}, [COMPRESSED], r"unknown key 'gradient'"),
        (None, ["gradients.level=sharded"], r"cannot be \"sharded\" under ZeRO"),
    ],
    ids=str,
)
def test_a_block_that_says_otherwise_is_refused(
    block: Any, overrides: list[str], message: str, flora_block: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        flora_block(block, *overrides)


def test_ddp_needs_a_parameter_of_its_own(tiny: Tiny) -> None:
    from flora_dist import Flora
    from flora_dist.trainer.gradients import check_sizes

    config = tiny(FLORA, COMPRESSED, "backend.name=ddp")
    matrices = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    with pytest.raises(ValueError, match="every parameter of this model would be sketched"):
        check_sizes(config, Flora(matrices.named_parameters()))
