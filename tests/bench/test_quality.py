# SPDX-License-Identifier: Apache-2.0
"""The quality bench: its plan holds every row it promises, and every row steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist import Flora
from flora_dist.core.state.settings import SKETCHES, TRANSFERS
from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.data import Order
from flora_dist.trainer.gradients import keep_sketched
from flora_dist.trainer.model import build_model, read_model_config
from flora_dist.trainer.tokenizer import ByteTokenizer
from tests.bench.quality_compressed import FULL as COMPRESSED_FULL
from tests.bench.quality_compressed import (
    MANY_FULL,
    RATIOS,
    RULES,
    compressed_rows,
    many_rows,
)
from tests.bench.quality_plan import (
    ADAMW,
    CENTRE,
    CENTRE_NAME,
    CONTROL,
    FLORA,
    FULL,
    GRID,
    NONE,
    QUICK,
    QUICK_ROWS,
    Row,
    Run,
    all_rows,
    lr_of,
)
from tests.bench.quality_run import Settings, build, config_of_run, gradients_of, groups_of
from tests.bench.quality_sceptic import sceptic_rows
from tests.bench.quality_table import dense_twin

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
ROWS = {row.name: row for row in all_rows()}
COMPRESSED = {row.name: row for row in compressed_rows()}
SCEPTIC = {row.name: row for row in sceptic_rows()}
EVERY_ROW = ROWS | COMPRESSED | {n: row for n, row in SCEPTIC.items() if n == row.family}
OF_THE_PAPER = {"blend", "flora", "flora_strict"}
"""Rules of the first table; its other momenta are tuned in the sceptic's."""


def llama(name: str) -> torch.nn.Module:
    config = ModelConfig(config=str(CONFIGS / name))
    network = read_model_config(config, ByteTokenizer(), 64)
    network.num_hidden_layers = 1
    return build_model(config, network, seed=0)


def flora_rows() -> list[Row]:
    return [row for row in all_rows() if row.optimizer == "flora"]


def values_around(centre: dict[str, Any], option: str) -> set[Any]:
    """What an option takes in the rows that differ from a centre in nothing else."""
    return {
        row.options[option]
        for row in flora_rows()
        if not (row.matrices or row.ends or row.whole_rows)
        and {**row.options, option: None} == {**centre, option: None}
    }


def test_no_two_rows_share_a_name_or_a_setting() -> None:
    for table in (all_rows(), compressed_rows()):
        settings = {repr(replace(row, name="", factor="")) for row in table}
        assert len({row.name for row in table}) == len(settings) == len(table)


def test_rows_in_both_tables_are_the_same() -> None:
    assert all(ROWS[name] == COMPRESSED[name] for name in ROWS.keys() & COMPRESSED)


def test_every_rule_is_there_at_every_ratio() -> None:
    found = {
        (r.options["momentum"], r.options["rank"]) for r in flora_rows() if r.factor == "ratio"
    }
    rules = OF_THE_PAPER
    assert found == {(rule, rank) for rule in rules for rank in (32, 16, 8, 4)}


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("kappa", {20, 200, 1000}),
        ("blend_gain", {1.0, 2.0, 4.0, 64 / 8}),
        ("beta1", {0.8, 0.9, 0.95}),
        ("clip", {None, 1.0, 2.0}),
        ("momentum", {*OF_THE_PAPER, "none"}),
    ],
)
def test_a_factor_varies_alone_around_the_centre(option: str, values: set[Any]) -> None:
    assert values_around(CENTRE, option) == values


def test_every_sketch_and_transfer_varies_alone() -> None:
    assert values_around(FLORA, "sketch") == set(SKETCHES)
    # With a window change within the run: kappa 20.
    assert values_around(FLORA | {"kappa": 20}, "transfer") == set(TRANSFERS)
    assert values_around(CENTRE | {"kappa": 20}, "transfer") == {"shrink", "reset"}


@pytest.mark.parametrize("rule", ["blend", "flora"])
def test_blocks_vary_at_one_ratio(rule: str) -> None:
    rows = [r for r in flora_rows() if r.factor == "block" and r.options["momentum"] == rule]
    plain = [r for r in rows if r.whole_rows is None]
    assert {r.options["block"] for r in plain} == {16, 256}
    assert {r.options["block"] // r.options["rank"] for r in plain} == {8}
    assert [r.whole_rows for r in rows if r not in plain] == [8]


def test_the_baselines_and_controls_are_there() -> None:
    assert ROWS["AdamW"].optimizer == "adamw"
    assert ROWS["Adafactor (torch)"].optimizer == "adafactor"
    assert ROWS[NONE].options["momentum"] == "none"
    assert ROWS["full momentum"].options["rank"] is None
    assert {r.whole_rows for r in all_rows() if r.optimizer == "paper"} == {2, 8}
    scaled = {r.options["momentum"] for r in flora_rows() if r.scales_by_weight}
    assert scaled == {"blend", "none"}
    assert set(QUICK_ROWS) <= set(ROWS)
    assert len(GRID) >= 4
    assert FULL.seeds >= 2
    assert QUICK.seeds >= 2


def test_the_control_keeps_momentum_on_1_d_parameters_only() -> None:
    model = llama("llama_tiny.json")
    optimizer = build(ROWS[CONTROL], model, lr=1e-3, seed=0)
    assert isinstance(optimizer, Flora)
    for group in optimizer.param_groups:
        dims = {parameter.ndim for parameter in group["params"]}
        assert dims == ({2} if group["momentum"] == "none" else {1})


def test_dense_ends_are_embedding_and_head_alone() -> None:
    groups = groups_of(ROWS["blend, embedding and head dense"], llama("llama_tiny.json"))
    dense = [name for g in groups if "rank" in g for name, _ in g["params"]]
    assert dense == ["model.embed_tokens.weight", "lm_head.weight"]


def test_whole_rows_are_gaussian_where_hadamard_cannot() -> None:
    model = torch.nn.Module()
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    for name, shape in (("even", (64, 128)), ("odd", (96, 128))):
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    flora = {
        g["params"][0][0]: {k: v for k, v in g.items() if k != "params"}
        for g in groups_of(ROWS["flora, block full"], model)
    }
    blend = {g["params"][0][0]: g["block"] for g in groups_of(ROWS["blend, block full"], model)}
    assert flora == {
        "even": {"block": "full", "rank": 8},
        "odd": {"block": "full", "rank": 12, "sketch": "gaussian"},
    }
    assert blend == {"even": "full", "odd": 64}


def test_gradients_are_sketched_for_every_rule_at_every_ratio() -> None:
    found = {
        (row.options["momentum"], CENTRE["block"] / row.gradient_rank)
        for row in COMPRESSED.values()
        if row.gradient_rank is not None and row.gradient_bits == 32
    }
    assert set(RULES) == {*OF_THE_PAPER, "none"}
    assert found == {(rule, ratio) for rule in RULES for ratio in (2, 4, 8, 16)}
    assert set(RATIOS) == {2, 4, 8, 16}


@pytest.mark.parametrize("rows", [compressed_rows(), many_rows()])
def test_sketched_rows_differ_from_a_dense_one_in_the_gradient_alone(rows: tuple[Row, ...]) -> None:
    by_name = {row.name: row for row in rows}
    for row in rows:
        twin = dense_twin(row, rows)
        if row.gradient_rank is None:
            assert twin is None
        else:
            assert twin is not None
            assert by_name[twin].options == row.options
            assert by_name[twin].gradient_rank is None


def test_a_step_of_many_micro_batches_has_the_tokens_of_others() -> None:
    assert MANY_FULL.global_batch * MANY_FULL.sequence_length == (
        COMPRESSED_FULL.global_batch * COMPRESSED_FULL.sequence_length
    )
    assert max(row.micro_batches for row in many_rows()) == MANY_FULL.global_batch == 16


@pytest.mark.parametrize("name", [ADAMW, CENTRE_NAME])
def test_no_accumulation_means_the_same_sequences_in_more_steps(name: str) -> None:
    settings, run = Settings(model="", data="", size=FULL), Run(name, 0, 0)
    whole = config_of_run(settings, COMPRESSED[name], run)
    cut = config_of_run(settings, COMPRESSED[f"{name}, no accumulation"], run)
    assert cut.train.steps == 4 * whole.train.steps
    assert cut.schedule.warmup_steps == 4 * whole.schedule.warmup_steps
    assert cut.evaluation.every == 4 * whole.evaluation.every
    order = Order(sequences=100, global_batch=whole.train.global_batch, seed=0)
    quarters = replace(order, global_batch=cut.train.global_batch)
    found = [index for step in range(4, 8) for index in quarters.global_indices(step)]
    assert found == list(order.global_indices(1))


@pytest.mark.parametrize("name", list(EVERY_ROW))
def test_every_row_steps_on_llama_9m(name: str) -> None:
    model, row = llama("llama_9m.json"), EVERY_ROW[name]
    optimizer = build(row, model, lr=1e-3, seed=0)
    keep_sketched(model, optimizer, gradients_of(row))
    ones = [torch.ones_like(parameter) for parameter in model.parameters()]
    torch.autograd.backward(list(model.parameters()), ones)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    after = list(model.parameters())
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    assert all(bool(a.isfinite().all()) for a in after)


def test_a_relative_learning_rate_means_the_same_first_update() -> None:
    plain, relative = ROWS["AdamW"], ROWS["Flora.paper, ratio 8"]
    assert lr_of(plain, 1, 0.02) == 2e-3
    assert lr_of(relative, 1, 0.02) * 0.02 == pytest.approx(2e-3, rel=1e-15)
