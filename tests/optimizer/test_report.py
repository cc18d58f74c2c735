# SPDX-License-Identifier: Apache-2.0
"""``report()``: every parameter, why it is dense, and bytes that are the bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from flora_dist import Flora
from flora_dist.kernels.library import found
from tests.battery import zoo
from tests.bench import state_bytes
from tests.optimizer import runs


def _conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 1))


def _transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 100)


MODELS = {"zoo": lambda: zoo.build(torch.float32), "conv": _conv_net, "attention": _transformer}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"state_dtype": "bfloat16"},
        {"momentum": "none"},
        {"momentum": "apollo"},
        {"rank": None},
        {"rank": 2, "block": "full", "sketch": "gaussian", "momentum": "flora"},
        {"rank": 1, "block": 4, "momentum": "blend"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", MODELS)
def test_reported_bytes_are_the_bytes_of_the_state_tensors(
    model: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    built = MODELS[model]().to(dtype)
    optimizer = Flora(built.named_parameters(), **{"rank": 2, "block": 16, **settings})
    before = optimizer.report()
    for parameter in built.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.report() == before
    assert before.state_bytes == runs.state_bytes(optimizer)
    trained = [p for p in built.parameters() if p.requires_grad]
    assert before.adamw_bytes == 8 * sum(p.numel() for p in trained)
    by_name = dict(built.named_parameters())
    for row in before.rows:
        kept = optimizer.state[by_name[row.name]].values()
        tensors = [value for value in kept if isinstance(value, torch.Tensor)]
        assert row.state_bytes == sum(t.numel() * t.element_size() for t in tensors), row.name


def test_every_trainable_parameter_has_a_line_that_says_how_and_why() -> None:
    model = zoo.build(torch.float32)
    optimizer = Flora(model.named_parameters(), rank=2, block=8, state_dtype="bfloat16")
    report = optimizer.report()
    text = str(report)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {row.name for row in report.rows} == trained
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert set(lines) == trained | {"parameter", "all"}
    assert "blend, hadamard 2 per block of 8, bfloat16" in lines["up.weight"]
    assert "37x20" in lines["up.weight"]
    assert "dense: 1-D" in lines["norm.weight"]
    # blocks of 2 keep one number each: 2 of 3 columns
    assert "dense: rank 1 per block of 2 would not halve 3 columns" in lines["narrow.weight"]
    assert f"{report.state_bytes:,}" in lines["all"]
    assert f"{report.adamw_bytes:,}" in lines["all"]


def test_the_summary_names_the_level_and_puts_equal_layers_on_one_line() -> None:
    layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(12)])
    summary = Flora(layers.named_parameters(), rank=8).report().summary()
    assert "gradients=dense" in summary
    assert "  blend, hadamard 8 per block of 64, 8 bits: *.weight (12)" in summary.splitlines()
    assert "  dense: 1-D: *.bias (12)" in summary.splitlines()


def test_the_summary_is_printed_once_at_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    optimizer.report()
    assert capsys.readouterr() == ("", "")
    runs.train(optimizer, parameters, range(1))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == optimizer.report().summary() + "\n"
    runs.train(optimizer, parameters, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    runs.train(optimizer, parameters, range(1))
    assert capsys.readouterr() == ("", "")


def test_no_compressed_parameter_means_no_bytes_per_element() -> None:
    report = Flora(nn.Linear(64, 64).named_parameters(), rank=None).report()
    assert report.bytes_per_compressed_element == 0.0


@pytest.mark.parametrize(("state_dtype", "bound"), [("float32", 0.27), ("bfloat16", 0.14)])
def test_llama_60m_keeps_at_most_a_quarter_byte_per_compressed_element(
    state_dtype: str, bound: float
) -> None:
    """From the file's config, embeddings and head included; shapes only, on the meta device."""
    with torch.device("meta"):
        model = state_bytes.llama_60m()
    optimizer = Flora(model.named_parameters(), rank=4, block=64, state_dtype=state_dtype)
    report = optimizer.report()
    compressed = {row.name for row in report.rows if row.is_compressed}
    assert compressed == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= compressed
    elements = sum(row.local_elements for row in report.rows if row.is_compressed)
    config = json.loads(state_bytes.CONFIG.read_text())
    # q, k, v, o and three of the MLP per layer, embedding and head
    width, inner = config["hidden_size"], config["intermediate_size"]
    per_layer = 4 * width * width + 3 * width * inner
    tables = 2 * config["vocab_size"] * width
    assert elements == config["num_hidden_layers"] * per_layer + tables
    assert 1 / 16 * (4 if state_dtype == "float32" else 2) < report.bytes_per_compressed_element
    assert report.bytes_per_compressed_element <= bound


def test_a_report_says_what_the_compiled_kernels_leave_to_torch() -> None:
    _, optimizer = runs.pair(torch.float32, momentum="apollo", rank=1, orthogonalise=300)
    left = "; orthogonalise=300: torch's operators"
    assert optimizer.report().kernels.endswith(left) == (found().operators is not None)
    _, default = runs.pair(torch.float32, momentum="blend")
    assert "torch's operators" not in default.report().kernels.partition(";")[2]
