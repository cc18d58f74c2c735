# SPDX-License-Identifier: Apache-2.0
"""The quality bench's runs: which come next, that they resume, and what becomes of their folder."""

from __future__ import annotations

import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench import quality
from tests.bench.quality_plan import (
    ADAMW,
    CENTRE_NAME,
    FULL,
    GRID,
    Run,
    Size,
    all_rows,
    next_runs,
    resized,
    rows_named,
)
from tests.bench.quality_run import Settings

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
ROWS = {row.name: row for row in all_rows()}
TINY = Size(
    steps=3, layers=1, global_batch=2, sequence_length=16, evaluations=1, sequences=2, extensions=0
)


def planned(losses: dict[int, float], **seeds: float) -> list[tuple[int, int]]:
    """(exponent, seed) to run next for one row with these losses of seed 0."""
    done = {Run("AdamW", e, 0): loss for e, loss in losses.items()}
    done |= {Run("AdamW", 1, int(seed[1:])): loss for seed, loss in seeds.items()}
    runs = next_runs([ROWS["AdamW"]], done, FULL)
    return [(run.exponent, run.seed) for run in runs]


def test_a_row_runs_its_grid_then_the_second_seed_of_its_best() -> None:
    assert planned({}) == [(e, 0) for e in GRID]
    assert planned({-1: 3.0, 2: 1.0}) == [(0, 0), (1, 0)]
    assert planned({-1: 3.0, 0: 2.0, 1: 1.0, 2: math.nan}) == [(1, 1)]
    assert planned({-1: 3.0, 0: 2.0, 1: 1.0, 2: math.inf}, s1=1.0) == []


def test_a_best_at_the_end_of_the_grid_goes_on_beyond_it_twice() -> None:
    falling = {-1: 4.0, 0: 3.0, 1: 2.0, 2: 1.0}
    assert planned(falling) == [(3, 0)]
    assert planned(falling | {3: 0.9}) == [(4, 0)]
    assert planned(falling | {3: 0.9, 4: 0.8}) == [(4, 1)]
    assert planned({-1: 1.0, 0: 2.0, 1: 3.0, 2: 4.0}) == [(-2, 0)]


def test_an_unknown_row_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\['adam'\] are none of AdamW; none"):
        rows_named(["AdamW", "adam"], all_rows())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    text = tmp_path / "text.txt"
    text.write_text("the same seed gives the same training run; " * 60, encoding="utf-8")
    return Settings(model=str(CONFIGS / "llama_tiny.json"), data=str(text), size=TINY, device="cpu")


def slice_of(
    settings: Settings,
    folder: Path,
    *names: str,
    table: str = "optimizers",
    resume: bool = False,
) -> quality.Store:
    rows = rows_named(names, quality.TABLES[table].rows)
    store = quality.Store(folder, {"settings": 1}, resume=resume)
    console = Console(file=io.StringIO())
    with ThreadPoolExecutor(1) as pool:
        quality.run_all(
            quality.TABLES[table], pool, rows, settings, store, workers=1, console=console
        )
    quality.report(quality.TABLES[table], rows, settings, store, folder, console)
    return store


def test_a_slice_runs_and_resumes_to_the_same_table(settings: Settings, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    names = (ADAMW, CENTRE_NAME)
    store = slice_of(settings, whole, *names)
    assert len(store.records) == 2 * (len(GRID) + 1)
    results = json.loads((whole / "results.json").read_text())
    assert [line["row"] for line in results["rows"]] == ["AdamW", "blend, ratio 8"]
    adamw, blend = results["rows"]
    assert 0 < blend["state_bytes"] < adamw["state_bytes"]
    assert adamw["share_of_adamw"] == pytest.approx(1.0, rel=1e-3)  # and a step count per tensor
    assert blend["spread"] == max(blend["seeds"]) - min(blend["seeds"]) > 0
    assert {file.name for file in whole.iterdir()} == {
        "runs.jsonl",
        "results.json",
        "loss_by_tokens.png",
        "loss_by_state.png",
    }

    # Interrupted while the fourth run was written down.
    lines = (whole / "runs.jsonl").read_text().splitlines(keepends=True)
    cut.mkdir()
    (cut / "runs.jsonl").write_text("".join(lines[:4]) + lines[4][:40])
    slice_of(settings, cut, *names, resume=True)
    again = json.loads((cut / "results.json").read_text())
    for line in (*results["rows"], *again["rows"]):
        del line["tokens_per_second"]
    assert again["rows"] == results["rows"]


def test_the_sceptics_table_has_one_line_for_each_rule(settings: Settings, tmp_path: Path) -> None:
    names = ("Muon (torch)", "vectors", "vectors, clip 2.0")
    size = replace(settings.size, grid=(0,), seeds=2)
    slice_of(replace(settings, size=size), tmp_path / "out", *names, table="sceptic")
    lines = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert sorted(line["row"] for line in lines) == ["Muon (torch)", "vectors"]
    by_rule = {line["row"]: line for line in lines}
    # One learning rate, two beyond it, a change and a seed.
    assert (by_rule["Muon (torch)"]["runs"], by_rule["vectors"]["runs"]) == (4, 5)
    assert all(line["mean"] > 0 and len(line["seeds"]) == 2 for line in lines)
    assert by_rule["Muon (torch)"]["state_bytes"] > 10 * by_rule["vectors"]["state_bytes"]


def test_a_slice_of_sketched_gradients_runs(settings: Settings, tmp_path: Path) -> None:
    size, folder = resized(TINY, global_batch=4), tmp_path / "out"
    names = (CENTRE_NAME, "blend, gradient ratio 8", "AdamW, no accumulation")
    settings = replace(settings, size=replace(size, grid=(0,)))
    slice_of(settings, folder, *names, table="compressed")
    dense, sketched, short = json.loads((folder / "results.json").read_text())["rows"]
    assert {file.name for file in folder.iterdir()} == {
        "runs.jsonl",
        "results.json",
        "loss_by_ratio.png",
        "loss_by_bytes.png",
    }
    # Not 8: three norms stay dense, and rows of 88 end in a part of a block.
    assert 7 < dense["gradient_bytes"] / sketched["gradient_bytes"] < 8
    assert sketched["state_bytes"] == dense["state_bytes"]
    assert sketched["minus_dense"] == [
        pytest.approx(ours - theirs)
        for ours, theirs in zip(sketched["seeds"], dense["seeds"], strict=True)
    ]
    assert all(difference != 0 for difference in sketched["minus_dense"])
    assert dense["minus_dense"] is None
    # Four steps for each of the others', and as many tokens.
    assert short["curve"][-1][0] == dense["curve"][-1][0] == 3 * 4 * 16


def test_a_folder_with_runs_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    record = {"row": "AdamW", "exponent": 0, "seed": 0, "validation_loss": None}
    quality.Store(tmp_path, {"steps": 3}, resume=False).add(record)
    with pytest.raises(ValueError, match=r"must not overwrite another.*--resume"):
        quality.Store(tmp_path, {"steps": 3}, resume=False)
    with pytest.raises(ValueError, match="has another steps"):
        quality.Store(tmp_path, {"steps": 4}, resume=True)
    kept = quality.Store(tmp_path, {"steps": 3}, resume=True)
    assert kept.losses == {Run("AdamW", 0, 0): math.inf}
