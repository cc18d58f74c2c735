# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints and draws, without torch; what it refuses, and how."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flora_dist.cluster import planner
from tests.planner.runs import MODELS

LLAMA_7B = str(MODELS / "llama_7b.json")
ASKED = ("--model", LLAMA_7B, "--backend", "zero2", "--nodes", "2", "--gpus", "8")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="flora-dist plan")
    planner.add_arguments(parser)
    return planner.start(parser.parse_args([*arguments]))


def test_it_runs_where_torch_and_all_other_packages_are_missing(tmp_path: Path) -> None:
    block = (
        "import sys; sys.modules.update(torch=None, numpy=None, triton=None, deepspeed=None, "
        "transformers=None, matplotlib=None, rich=None, yaml=None)\n"
        "import argparse\nfrom flora_dist.cluster import planner\n"
        "parser = argparse.ArgumentParser()\nplanner.add_arguments(parser)\n"
        f"sys.exit(planner.start(parser.parse_args({[*ASKED, '--search']!r})))"
    )
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616 parameters" in done.stdout
    assert "Fewest ranks" in done.stdout


def test_the_table_has_every_method_and_a_line_for_embeddings_and_head(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = (*ASKED, "--rank", "8", "--gradients", "compressed", "--gradient-rank", "4")
    assert run(*asked) == 0
    text = capsys.readouterr().out
    rows = {line.split("  ")[0] for line in text.splitlines()}
    assert "embeddings, head" in rows
    assert {"Flora 1/8, compressed 1/16", "AdamW", "AdamW, 8-bit"} <= rows
    assert {"GaLore, rank 1024 (ddp)", "LoRA, rank 64", "AdamW, 4-bit", "Muon"} <= rows
    assert {"APOLLO, rank 1024 (ddp)", "APOLLO-Mini (ddp)"} <= rows
    assert "Flora 1/8, dense, bf16 alone" in rows
    assert {
        f"Flora 1/{ratio}, {level}" for ratio in (4, 8, 16) for level in ("dense", "fused")
    } <= rows
    assert "attention without stored scores" in text


def test_it_says_what_fits_and_the_largest_micro_batch_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ("--model", str(MODELS / "llama_1b.json"), "--backend", "fsdp2", "--memory", "14")

    def asked(*more: str) -> tuple[str, dict[str, str]]:
        assert run(*small, *more) == 0
        text = capsys.readouterr().out
        rows = [line.split("  ") for line in text.splitlines() if line.endswith(("yes", "no"))]
        return text.replace("\n  ", " "), {cells[0]: cells[-1] for cells in rows}

    text, fits = asked()
    said = {
        word: re.search(rf"^{word} 14 GiB: (.*)\.$", text, re.MULTILINE).group(1).split("; ")
        for word in ("Fits", "Does not fit")
    }
    assert said["Fits"] == [name for name, answer in fits.items() if answer == "yes"]
    assert said["Does not fit"] == [name for name, answer in fits.items() if answer == "no"]
    most = int(re.search(r"at most (\d+) sequences", text).group(1))
    assert asked("--micro-batch", str(most))[1]["Flora 1/4, dense"] == "yes"
    assert asked("--micro-batch", str(most + 1))[1]["Flora 1/4, dense"] == "no"
    assert "takes not one sequence" in asked("--memory", "1")[0]


def test_json_has_exact_integers_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, "--json", "--search", "--memory", "30", "--bandwidth", "200") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == 6738415616
    assert told["memory_bytes"] == 30 * 2**30
    for plan in told["plans"]:
        assert all(isinstance(size, int) for size in plan["bytes_per_rank"].values())
        assert plan["total_bytes"] == sum(plan["bytes_per_rank"].values())
        wire = plan["wire_bytes_per_step"]
        assert wire.pop("total") == sum(wire.values())
        seconds = plan["link_bytes_per_step"] * 8 / 200e9
        assert plan["link_seconds_per_step"] == pytest.approx(seconds)
    fits = {each["method"]: each["fits"] for each in told["search"]}
    assert fits["AdamW"] is not None
    galore = next(name for name in fits if name.startswith("GaLore"))
    assert fits[galore] is None  # replicated: no number of ranks helps


def test_unless_told_a_run_is_as_people_run_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED) == 0
    asked = capsys.readouterr().out.splitlines()[1]
    assert asked.endswith(
        "zero2, bfloat16; 1 micro-batch of 1 x 2048 tokens per rank and step, checkpointing"
    )
    assert (
        run("--model", str(MODELS / "gpt2.json"), "--backend", "fsdp", "--precision", "fp32") == 0
    )
    asked = capsys.readouterr().out.splitlines()[1]
    assert "fsdp2, float32; 1 micro-batch of 1 x 1024 tokens" in asked


def test_where_flora_does_not_pay_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    # Per GPU of 1,024 hardly anything is optimizer state; on one GPU most is.
    words = "In memory Flora does not pay here"
    assert run(*ASKED, "--nodes", "128") == 0
    assert words in capsys.readouterr().out
    assert run(*ASKED, "--nodes", "1", "--gpus", "1", "--rank", "8") == 0
    assert words not in capsys.readouterr().out
    assert run(*ASKED, "--nodes", "128", "--json") == 0
    assert words in json.loads(capsys.readouterr().out)["verdict"][1]


def test_7b_fits_one_gpu_of_24_gib_in_bfloat16_alone(capsys: pytest.CaptureFixture[str]) -> None:
    alone = ("--precision", "bf16-pure", "--gradients", "compressed", "--memory", "24")
    one = ("--model", LLAMA_7B, "--backend", "ddp", "--accumulate", "4", "--json")
    assert run(*one, *alone) == 0
    told = json.loads(capsys.readouterr().out)
    plans = {plan["method"]: plan["total_bytes"] for plan in told["plans"]}
    assert plans["Flora 1/8, compressed, bf16 alone"] <= told["memory_bytes"]
    assert plans["AdamW, 8-bit"] > told["memory_bytes"]


def test_70b_fits_eight_gpus_of_32_gib_stepped_in_backward_or_with_sketches_of_shards(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    sizes |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    path = tmp_path / "llama_70b.json"
    path.write_text(json.dumps(json.loads(Path(LLAMA_7B).read_text()) | sizes), encoding="utf-8")
    alone = ("--precision", "bf16-pure", "--state-bits", "4", "--memory", "32", "--json")
    asked = ("--model", str(path), "--backend", "fsdp2", "--gpus", "8", *alone)
    for more, fits in (
        (("--step-in-backward",), True),
        (("--gradients", "sharded", "--rank", "4", "--accumulate", "4"), True),
        ((), False),
    ):
        assert run(*asked, *more) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["plans"][0]["total_bytes"] <= told["memory_bytes"]) == fits
        assert (
            min(p["total_bytes"] for p in told["plans"] if p["method"] == "AdamW, 8-bit")
            > (told["memory_bytes"])
        )


def test_a_search_says_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("--model", str(MODELS / "llama_tiny.json"), "--backend", "zero2", "--gpus", "8")
    assert run(*tiny, "--search", "--memory", "0.001") == 0
    found = capsys.readouterr().out.partition("Fewest ranks")[2]
    assert "1024 in all" in found
    assert "none: the GiB are those of the largest cluster tried." in found


def test_the_picture_is_a_whole_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert run(*ASKED, "--picture", str(picture)) == 0
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert [*tmp_path.iterdir()] == [picture]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--nodes", "0"), ("--nodes", "at least 1", "got 0", "Pass 1")),
        (("--gpus", "-3"), ("--gpus", "at least 1", "got -3")),
        (("--accumulate", "0"), ("--accumulate", "at least 1")),
        (("--vocabulary", "0"), ("--vocabulary", "at least 1")),
        (("--memory", "0"), ("--memory", "above 0", "got 0")),
        (("--bandwidth", "nan"), ("--bandwidth", "above 0", "got nan")),
        (("--rank", "65"), ("rank must not exceed block", "rank=65, block=64", "Lower rank")),
        (("--gradient-rank", "99"), ("rank must be below block", "rank=99")),
        (("--block", "48"), ("power of two", "48", "Pass 16")),
        (("--sequence-length", "4096"), ("--sequence-length", "4096", "2048", "Lower it")),
        (
            ("--backend", "zero0", "--precision", "bfloat16-pure"),
            ("--precision bfloat16-pure", "zero0", "Use zero1"),
        ),
        (("--gradients", "sharded"), ("--gradients sharded", "zero2", "Use compressed")),
        (("--model", "nowhere.json"), ("--model", "nowhere.json", "See configs/model")),
        (("--picture", "plan.pdf"), ("--picture", ".png", "plan.pdf")),
        (("--picture", "nowhere/plan.png"), ("--picture", "folder that exists")),
        (("--lora-rank", "0"), ("--lora-rank", "at least 1")),
        (("--loss-chunk", "0"), ("--loss-chunk", "at least 1")),
        (
            ("--loss-chunk", "8", "--gradients", "fused"),
            ("--loss-chunk", "--gradients fused", "Leave it out"),
        ),
        (
            ("--step-in-backward",),
            ("--step-in-backward", "zero2 on 16 ranks, --gradients dense", "Use fsdp2"),
        ),
    ],
)
def test_a_mistake_is_said_with_rule_value_and_remedy_and_ends_with_2(
    changes: Sequence[str], words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*ASKED, *changes) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert [word for word in words if word not in told.err] == []


def test_a_picture_without_matplotlib_is_refused_before_anything_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*ASKED, "--picture", str(tmp_path / "plan.png")) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "flora-dist[train]" in told.err
