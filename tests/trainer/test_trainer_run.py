# SPDX-License-Identifier: Apache-2.0
"""Whole runs on one process: data, models, outputs, resume, and what bad input leaves behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flora_dist.trainer.backend import check_world
from flora_dist.trainer.config import Config
from flora_dist.trainer.run import run
from tests.trainer.support import metrics

Tiny = Callable[..., Config]


@pytest.mark.drawn
def test_a_run_leaves_metrics_summary_picture_and_its_config(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("optimizer={name: flora, lr: 1e-2}", "compare={name: adamw, lr: 1e-2}")
    assert run(config) == 0
    folder = tmp_path / "tiny"
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "summary.json", "summary.png"}
    assert names == {"compare", "model", *files}

    records = metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(r["tokens"] == 8 * 32 and r["tokens_per_second"] > 0 for r in records)
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6]
    # 257 tokens drawn evenly have log(257) = 5.55 nats; six steps must have learned the alphabet.
    assert records[0]["loss"] == pytest.approx(5.55, abs=0.15)
    assert records[-1]["validation_loss"] < 5.0

    summary = json.loads((folder / "summary.json").read_text())
    weights = summary["parameters"]
    # float32 moments, and one float32 step count for each of the 21 parameters
    assert summary["adamw"]["state_bytes"] == 8 * weights + 4 * 21
    assert summary["measured"]["adamw_bytes"] == 8 * weights
    assert summary["measured"]["state_bytes"] < 1.5 * weights  # about 1 byte each at ratio 4
    assert summary["measured"]["loss"] == pytest.approx(
        sum(r["loss"] for r in records) / len(records)
    )
    assert summary["measured"]["validation_loss"] == records[-1]["validation_loss"]
    assert metrics(folder / "compare")[0]["loss"] == pytest.approx(records[0]["loss"], abs=1e-6)

    png = (folder / "summary.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (1860, 540)
    assert len(png) > 20_000  # an empty pair of axes of this size has about 8 kB

    said = capsys.readouterr().out
    assert f"{weights:,} parameters, vocabulary 257" in said
    assert "AdamW" in said
    assert f"{summary['measured']['state_bytes']:,}" in said


def test_without_a_comparison_only_adamws_state_is_given_and_marked_as_computed(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny("optimizer={name: flora, lr: 1e-2}", "train.steps=1")) == 0
    said = capsys.readouterr().out
    assert "(computed)" in said
    assert said.count("not run") == 8


def test_floras_state_bytes_are_those_of_its_own_report(tiny: Tiny, tmp_path: Path) -> None:
    from flora_dist import Flora
    from tests.trainer.ragged import tiny_model

    config = tiny("optimizer={name: flora, lr: 1e-2}", "train.steps=1")
    assert run(config) == 0
    model = tiny_model(config)
    optimizer = Flora(model.named_parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["measured"]["state_bytes"] == optimizer.report().state_bytes


@pytest.mark.parametrize("backend", ["ddp", "fsdp1", "fsdp2"])
def test_one_process_without_torchrun_runs_every_backend_and_sends_nothing(
    backend: str, tiny: Tiny, tmp_path: Path
) -> None:
    assert run(tiny("output.name=plain", "train.steps=3")) == 0
    assert run(tiny(f"backend.name={backend}", "train.steps=3")) == 0
    plain, spread = metrics(tmp_path / "plain"), metrics(tmp_path / "tiny")
    # One process adds up the same float32 numbers; 1e-5 leaves room for another order in a kernel.
    assert [r["loss"] for r in spread] == pytest.approx([r["loss"] for r in plain], abs=1e-5)
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["measured"]["bytes_sent"] == 0


def test_adafactor_trains_and_is_refused_where_torchs_cannot(tiny: Tiny, tmp_path: Path) -> None:
    adafactor = "optimizer={name: adafactor, lr: 1e-2}"
    assert run(tiny(adafactor)) == 0
    assert metrics(tmp_path / "tiny")[-1]["loss"] < metrics(tmp_path / "tiny")[0]["loss"]
    with pytest.raises(ValueError, match=r"Adafactor cannot step DTensors"):
        run(tiny(adafactor, "backend.name=fsdp2", "output.name=other"))


def test_tensorboard_gets_the_same_scalars(tiny: Tiny, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tiny("output.tensorboard=true")) == 0
    events = EventAccumulator(str(tmp_path / "tiny" / "tensorboard" / "AdamW"))
    events.Reload()
    written = [(e.step, e.value) for e in events.Scalars("loss")]
    expected = [(r["step"], r["loss"]) for r in metrics(tmp_path / "tiny")]
    assert [step for step, _ in written] == [step for step, _ in expected]
    # TensorBoard keeps float32.
    assert [v for _, v in written] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert set(events.Tags()["scalars"]) >= {"loss", "lr", "validation_loss", "tokens_per_second"}


def test_the_vocabulary_is_the_tokenizers(
    tiny: Tiny, word_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny(f"data.tokenizer={word_tokenizer}")) == 0
    # 257 - 20 rows less in the embedding and in the head, 32 wide
    assert f"{41_696 - 2 * 237 * 32:,} parameters, vocabulary 20 (" in capsys.readouterr().out


def test_a_pretrained_folder_is_the_starting_point(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.trainer.ragged import tiny_model

    model = tiny_model(tiny("train.seed=5"))
    model.save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    assert run(tiny("train.seed=5", "train.steps=1", "output.name=drawn")) == 0
    loaded = f"model={{pretrained: {tmp_path / 'saved'}}}"
    # The order of the data and the weights come from one seed: with the weights of seed 5 loaded,
    # the run of seed 5 must repeat itself, and it must not for weights drawn from seed 6.
    assert run(tiny(loaded, "train.seed=5", "train.steps=1", "output.name=loaded")) == 0
    assert run(tiny("train.seed=6", "train.steps=1", "output.name=other")) == 0
    first = {n: metrics(tmp_path / n)[0]["loss"] for n in ("drawn", "loaded", "other")}
    assert first["drawn"] == first["loaded"] != first["other"]
    assert capsys.readouterr().err == ""  # loading draws no bar: other processes must stay silent


def test_tied_embeddings_train_and_count_once(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(network))
    every = ["checkpoint.every=3", f"model.config={path}", "backend.name=fsdp2"]
    assert run(tiny(*every)) == 0
    # token 257 x 32 and position 32 x 32 embeddings, one layer, the last norm; no head of its own
    layer = 2 * 2 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert f"{257 * 32 + 32 * 32 + layer + 2 * 32:,} parameters" in capsys.readouterr().out
    resume = f"checkpoint.resume={tmp_path / 'tiny' / 'checkpoints' / 'step-00000003'}"
    before = metrics(tmp_path / "tiny")
    assert run(tiny(*every, resume)) == 0
    assert [r["loss"] for r in metrics(tmp_path / "tiny")] == [r["loss"] for r in before]


@pytest.mark.parametrize("optimizer", ["adamw", "flora", "adafactor"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    optimizer: str, tiny: Tiny, tmp_path: Path
) -> None:
    options = [f"optimizer={{name: {optimizer}, lr: 1e-2}}", "schedule.warmup_steps=2"]
    whole = [*options, "checkpoint={every: 2, keep: null}", "output.name=whole"]
    assert run(tiny(*whole)) == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    assert run(tiny(*options, f"checkpoint.resume={checkpoint}", "output.name=rest")) == 0
    kept = ("step", "loss", "lr", "validation_loss")
    whole_records, rest = (
        [{key: r.get(key) for key in kept} for r in metrics(tmp_path / name)]
        for name in ("whole", "rest")
    )
    assert rest == whole_records[2:]


def test_going_on_in_the_same_folder_keeps_the_lines_before_the_checkpoint(
    tiny: Tiny, tmp_path: Path
) -> None:
    assert run(tiny("checkpoint.every=2")) == 0
    before = metrics(tmp_path / "tiny")
    checkpoints = tmp_path / "tiny" / "checkpoints"
    resume = f"checkpoint.resume={checkpoints / 'step-00000004'}"
    assert run(tiny("checkpoint.every=2", resume)) == 0
    after = metrics(tmp_path / "tiny")
    assert [r["step"] for r in after] == [1, 2, 3, 4, 5, 6]
    assert after[:4] == before[:4]
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "latest",
        "step-00000004",
        "step-00000006",
    ]


def test_a_checkpoint_of_another_run_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    assert run(tiny("checkpoint.every=3")) == 0
    resume = f"checkpoint.resume={tmp_path / 'tiny' / 'checkpoints' / 'step-00000003'}"
    other = tmp_path / "other.json"
    network = json.loads(Path(tiny().model.config or "").read_text()) | {"num_hidden_layers": 3}
    other.write_text(json.dumps(network))
    for change, message in (
        ("train.seed=1", r"differs: seed was 0, is 1"),
        (f"model.config={other}", r"model.num_hidden_layers was 2, is 3"),
        ("optimizer={name: flora, lr: 1e-2}", r"optimizer was 'adamw', is 'flora'"),
        ("optimizer.lr=1e-3", r"differs: options.lr was 0.01, is 0.001"),
        ("train.global_batch=4", r"global_batch was 8, is 4"),
        ("data.validation_every=10", r"corpus was"),
        ("train.steps=3", r"train.steps must be above the checkpoint's step; it is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tiny(resume, change, "output.name=next"))
    with pytest.raises(ValueError, match=r"has no checkpoint|names no checkpoint"):
        run(tiny(f"checkpoint.resume={tmp_path}", "output.name=next"))
    assert not (tmp_path / "next").exists()


def test_an_existing_run_is_kept_unless_told_otherwise(tiny: Tiny, tmp_path: Path) -> None:
    assert run(tiny("train.steps=1")) == 0
    with pytest.raises(ValueError, match=r"a run must not overwrite another; .*tiny' exists"):
        run(tiny("train.steps=2"))
    assert len(metrics(tmp_path / "tiny")) == 1
    assert run(tiny("train.steps=2", "output.overwrite=true")) == 0
    assert len(metrics(tmp_path / "tiny")) == 2


def test_overwrite_spares_a_folder_that_is_no_run(tiny: Tiny, tmp_path: Path) -> None:
    precious = tmp_path / "tiny" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("do not lose")
    with pytest.raises(ValueError, match="so something else wrote it"):
        run(tiny("output.overwrite=true"))
    assert precious.read_text() == "do not lose"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch=100000"], r"global_batch=100000, the corpus has \d+ training"),
        (["backend={name: hsdp, replicate: 2, shard: 2}"], r"is 4, there are 1 processes"),
        (["data.sequence_length=512"], r"within the model's positions; it is 512, .* has 256"),
        (["data.field=body"], r"data.field must name a column"),
        (["model.config=configs/README.md"], r"must name a transformers config"),
        (["model={pretrained: tests}"], r"a trained model is the folder of a run"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing_behind(
    overrides: list[str], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny(*overrides))
    assert not any(tmp_path.iterdir())


def test_an_optimizer_that_refuses_its_options_leaves_nothing_behind(
    tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="rank"):
        run(tiny("optimizer={name: flora, lr: 1e-2, rank: 0}"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ([], 2, r"backend none runs on one process; there are 2"),
        (["backend.name=ddp"], 3, r"8 is not one of 2 x 3 = 6"),
        (["backend={name: hsdp, replicate: 2, shard: 2}"], 2, r"is 4, there are 2 processes"),
    ],
)
def test_a_world_that_does_not_fit_is_an_error_with_its_numbers(
    overrides: list[str], size: int, message: str, tiny: Tiny
) -> None:
    with pytest.raises(ValueError, match=message):
        check_world(tiny(*overrides), size)


def test_clipping_holds_the_gradients_norm(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW) -> None:
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        seen.append(float(torch.nn.utils.get_total_norm(grads)))
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    assert run(tiny("train.steps=2", "output.name=free")) == 0
    assert run(tiny("train.steps=2", "train.max_grad_norm=0.1")) == 0
    assert min(seen[:2]) > 0.2
    assert seen[2:] == pytest.approx([0.1, 0.1], rel=1e-4)  # torch adds 1e-6 to the norm


def test_bfloat16_arithmetic_stays_close_and_keeps_float32_weights(
    tiny: Tiny, tmp_path: Path
) -> None:
    losses = {}
    for name, overrides in {
        "full": [],
        "autocast": ["train.precision=bfloat16"],
        "policy": ["train.precision=bfloat16", "backend.name=fsdp2"],
    }.items():
        assert run(tiny(f"output.name={name}", *overrides)) == 0
        losses[name] = [r["loss"] for r in metrics(tmp_path / name)]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["measured"]["weight_bytes"] == 4 * summary["parameters"]
    for name in ("autocast", "policy"):
        # bfloat16 has 8 bits: 0.4 % of a logit of size 1, averaged over 256 tokens
        assert losses[name] == pytest.approx(losses["full"], abs=0.02)
        assert losses[name] != losses["full"]


@pytest.mark.parametrize("backend", ["none", "ddp", "fsdp1", "fsdp2"])
def test_bfloat16_pure_trains_weights_of_two_bytes_and_no_others(
    backend: str, tiny: Tiny, tmp_path: Path
) -> None:
    flora = "optimizer={name: flora, lr: 2e-3, rank: 2, block: 8}"
    for precision in ("float32", "bfloat16-pure"):
        how = (f"backend.name={backend}", f"train.precision={precision}")
        assert run(tiny(f"output.name={precision}", flora, *how)) == 0
    full, pure = (
        [r["loss"] for r in metrics(tmp_path / name)] for name in ("float32", "bfloat16-pure")
    )
    # bfloat16 has 8 bits: 0.4 % of a logit of size 1, averaged over 256 tokens
    assert pure == pytest.approx(full, abs=0.03)
    assert pure != full
    assert full[-1] < full[0] - 0.1
    summary = json.loads((tmp_path / "bfloat16-pure" / "summary.json").read_text())
    assert summary["measured"]["weight_bytes"] == 2 * summary["parameters"]


def test_the_trainer_gives_advice_once_before_it_trains(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny("optimizer={name: flora, lr: 1e-2, momentum: flora_strict}")) == 0
    said = capsys.readouterr().out
    assert said.count("warning: momentum='flora_strict' moves weights only inside") == 1
    assert run(tiny("optimizer={name: flora, lr: 1e-2}", "output.name=other")) == 0
    assert "warning" not in capsys.readouterr().out
