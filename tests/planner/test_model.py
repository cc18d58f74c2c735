# SPDX-License-Identifier: Apache-2.0
"""The planner's list of parameters is that of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist.cluster.planner.model import Parameter, read_model
from tests.planner.runs import MODELS

FILES = sorted(MODELS.glob("*.json"))
VARIANTS: dict[str, dict[str, Any]] = {
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, grouped heads, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 24},
}


def of_transformers(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the modules, without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def told(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    return [(parameter.name, parameter.shape) for parameter in read_model(path).parameters]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_shapes_and_order_are_those_of_transformers(path: Path) -> None:
    assert told(path) == of_transformers(path)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_so_are_those_of_variants_that_no_file_has(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = json.loads((MODELS / "llama_tiny.json").read_text(encoding="utf-8"))
    path = tmp_path / "variant.json"
    path.write_text(json.dumps(settings | changes), encoding="utf-8")
    assert told(path) == of_transformers(path)


def test_an_untied_gpt2_with_an_inner_width_too(tmp_path: Path) -> None:
    settings = json.loads((MODELS / "gpt2.json").read_text(encoding="utf-8"))
    settings |= {"tie_word_embeddings": False, "n_inner": 1000, "n_layer": 1}
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert told(path) == of_transformers(path)


def test_kinds_and_layers_say_what_is_a_table_and_what_belongs_to_a_layer() -> None:
    parameters = {p.name: p for p in read_model(MODELS / "llama_tiny.json").parameters}
    assert parameters["model.embed_tokens.weight"].kind == "embedding"
    assert parameters["lm_head.weight"].kind == "head"
    assert parameters["model.norm.weight"].kind == "vector"
    down = Parameter(
        name="model.layers.1.mlp.down_proj.weight", shape=(32, 88), kind="matrix", layer=1
    )
    assert parameters[down.name] == down


def test_the_vocabulary_may_be_another_than_the_files() -> None:
    model = read_model(MODELS / "llama_tiny.json", vocabulary=1000)
    assert [p.shape for p in model.parameters if p.kind in {"embedding", "head"}] == [
        (1000, 32),
        (1000, 32),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mixtral"}, "llama or gpt2.*'mixtral'"),
        ({"model_type": "llama", "vocab_size": 8}, "hidden_size must be a whole number.*None"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, "multiple of the heads.*10 and 3"),
        ({"model_type": "gpt2", "tie_word_embeddings": "no"}, "must be true or false.*'no'"),
        ([], "must hold a JSON object.*list"),
    ],
)
def test_what_is_no_known_model_is_refused_by_its_name(
    settings: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_model(path)


def test_a_file_that_is_missing_or_torn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers config in JSON.*nothing\.json"):
        read_model(tmp_path / "nothing.json")
    (tmp_path / "torn.json").write_text('{"model_type": "lla', encoding="utf-8")
    with pytest.raises(ValueError, match="transformers config in JSON"):
        read_model(tmp_path / "torn.json")
