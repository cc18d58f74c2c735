# SPDX-License-Identifier: Apache-2.0
"""The planner's list of parameters is that of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_dist.cluster.planner.config_file import read_model
from flora_dist.cluster.planner.decoders import DECODERS
from flora_dist.cluster.planner.model import Parameter
from tests.planner.runs import MODELS, build

FILES = sorted(MODELS.glob("*.json"))
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {**TINY, "model_type": "mistral", "head_dim": 10},
    "qwen2": {**TINY, "model_type": "qwen2"},
    "qwen3": {**TINY, "model_type": "qwen3", "head_dim": 10},
    "qwen3 with biases": {**TINY, "model_type": "qwen3", "attention_bias": True},
    "gemma": {**TINY, "model_type": "gemma"},
    "gemma2": {**TINY, "model_type": "gemma2", "head_dim": 10},
    "gemma3": {**TINY, "model_type": "gemma3_text", "head_dim": 10},
    "mixtral": {**TINY, "model_type": "mixtral", "num_local_experts": 5},
    "qwen2_moe": {
        **TINY,
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        **TINY,
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "t5": {"model_type": "t5", "vocab_size": 101, "d_model": 48, "d_kv": 10, "d_ff": 88}
    | {"num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "dropout_rate": 0.0},
    "t5 v1.1": {"model_type": "t5", "vocab_size": 101, "d_model": 48, "d_kv": 10, "d_ff": 88}
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    | {"num_heads": 4, "num_layers": 2},
}
"""Small models of every family beside llama and gpt2."""
VARIANTS: dict[str, dict[str, Any]] = {
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, grouped heads, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 24},
}


def of_transformers(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the modules, without memory."""
    with torch.device("meta"):
        model = build(path)
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


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_so_are_those_of_the_other_families(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert told(tmp_path / "config.json") == of_transformers(tmp_path / "config.json")


def test_a_folder_is_read_by_its_config_and_named_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text((MODELS / "llama_tiny.json").read_text(), encoding="utf-8")
    assert read_model(folder).name == "my-model"
    assert told(folder) == told(MODELS / "llama_tiny.json")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"folder with a config\.json.*my-model"):
        read_model(folder)


@pytest.mark.parametrize("family", DECODERS)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(
    family: str, tmp_path: Path
) -> None:
    # The sizes that have no default here are required; everything else is left out.
    needed = {key: TINY[key] for key in TINY if not key.startswith(("num_key", "max_"))}
    needed |= {"model_type": family, "num_attention_heads": 32, "hidden_size": 128}
    needed |= {"num_hidden_layers": 1, "pad_token_id": None}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(needed), encoding="utf-8")
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
        ({"model_type": "mamba"}, "one of llama, .*t5; .*'mamba'"),
        (
            {**FAMILIES["qwen3_moe"], "mlp_only_layers": [0.5]},
            "mlp_only_layers must be a list of whole numbers",
        ),
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
