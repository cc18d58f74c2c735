# SPDX-License-Identifier: Apache-2.0
"""Settings by role and by pattern of names: the groups that they make, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from flora_dist import Flora
from flora_dist.core.parameters.roles import role_of
from tests.optimizer import runs

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "tie_word_embeddings": False,
}


def _language_models() -> Iterator[nn.Module]:
    with torch.device("meta"):
        yield transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
        yield transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))
        moe = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
        yield transformers.MixtralForCausalLM(moe)
        gpt2 = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=50, tie_word_embeddings=False
        )
        yield transformers.GPT2LMHeadModel(gpt2)


def test_the_ends_of_language_models_are_known_by_their_names() -> None:
    for model in _language_models():
        ends: dict[str, Any] = {
            "embedding": model.get_input_embeddings(),  # type: ignore[operator]
            "head": model.get_output_embeddings(),  # type: ignore[operator]
        }
        found = {
            role: [n for n, _ in model.named_parameters() if role_of(n) == role] for role in ends
        }
        for role, module in ends.items():
            names = [n for n, p in model.named_parameters() if p is module.weight]
            assert names, (type(model), role)
            assert set(names) <= set(found[role]), (type(model), role)
        assert set(found["head"]) == set(names), type(model)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("encoder.layer.0.attention.self.value.weight", "value"),
        ("decoder.block.0.layer.0.SelfAttention.v.weight", "value"),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "other"),
        ("h.0.attn.c_attn.weight", "other"),
        ("encoder.layer.0.output.dense.weight", "other"),
        ("output.weight", "head"),
        ("classifier.out_proj.weight", "head"),
        ("transformer.wpe.weight", "embedding"),
        ("vit.embeddings.patch_embeddings.projection.weight", "other"),
        ("backbone.layers.0.mixer.A_log", "other"),
    ],
)
def test_a_name_has_the_role_that_its_last_module_has(name: str, role: str) -> None:
    assert role_of(name) == role


def _named() -> dict[str, nn.Parameter]:
    return runs.build(
        {
            "embed.weight": (30, 16),
            "layers.0.v_proj.weight": (16, 16),
            "layers.0.A_log": (16, 16),
            "layers.0.norm.weight": (16,),
            "lm_head.weight": (30, 16),
        }
    )


ROLES: dict[str, dict[str, Any]] = {
    "head": {"rank": None, "state_dtype": "bfloat16"},
    "embedding": {"momentum": "none"},
    "*.A_log": {"rank": None},
}


def test_each_parameter_is_stepped_by_the_settings_of_its_role_as_by_groups_of_its_own() -> None:
    by_role, by_hand = _named(), _named()
    one = Flora(by_role.items(), **runs.SETTINGS, roles=ROLES)
    groups: list[dict[str, Any]] = [
        {"params": [("embed.weight", by_hand["embed.weight"])], "momentum": "none"},
        {"params": [("lm_head.weight", by_hand["lm_head.weight"])], **ROLES["head"]},
        {"params": [("layers.0.A_log", by_hand["layers.0.A_log"])], "rank": None},
        {"params": [(n, by_hand[n]) for n in by_hand if "proj" in n or "norm" in n]},
    ]
    other = Flora(groups, **runs.SETTINGS)
    runs.train(one, by_role, range(4))
    runs.train(other, by_hand, range(4))
    runs.assert_equal(runs.values(by_role), runs.values(by_hand))
    momenta = {n: one.state[p].get("momentum") for n, p in by_role.items()}
    assert momenta["embed.weight"] is None
    assert momenta["lm_head.weight"].dtype == torch.bfloat16
    assert momenta["lm_head.weight"].shape == (30, 16)
    assert momenta["layers.0.A_log"].shape == (16, 16)
    assert momenta["layers.0.v_proj.weight"].ndim == 3


def test_the_report_says_which_role_each_parameter_has() -> None:
    report = Flora(_named().items(), **runs.SETTINGS, roles=ROLES).report()
    assert {row.name: row.role for row in report.rows} == {
        "embed.weight": "embedding",
        "layers.0.v_proj.weight": "value",
        "layers.0.A_log": "other",
        "layers.0.norm.weight": "other",
        "lm_head.weight": "head",
    }
    line = next(x for x in str(report).splitlines() if x.startswith("lm_head.weight"))
    assert "30x16" in line
    assert line.split()[2:5] == ["head", "dense:", "rank=None"]


def test_a_group_keeps_what_it_names_itself_and_a_pattern_comes_before_a_role() -> None:
    named = _named()
    groups = [{"params": list(named.items()), "kappa": 7}]
    roles = {"head": {"kappa": 9}, "lm_*": {"beta1": 0.5}, "value": {"beta1": 0.7}}
    found = Flora(groups, roles=roles).param_groups
    kept = {g["param_names"][0]: (g["kappa"], g["beta1"]) for g in found}
    assert kept == {
        "embed.weight": (7, 0.9),
        "layers.0.v_proj.weight": (7, 0.7),
        "lm_head.weight": (7, 0.5),
    }


def test_a_tied_weight_has_one_role() -> None:
    weight = nn.Parameter(torch.zeros(30, 16))
    both = [("lm_head.weight", weight), ("embed.weight", weight)]
    groups = Flora(both, roles=ROLES).param_groups
    assert [(g["param_names"], g["momentum"]) for g in groups] == [(["embed.weight"], "none")]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"heads": {}}, "Did you mean 'head'"),
        ({"router": {"rank": None}}, r"Pass '\*router\*' for a pattern"),
        ({"head": None}, "must be settings by name; 'head' has None"),
        ({"head": {"rnak": 1}}, "Did you mean 'rank'"),
        ({"head": {"rank": 0}}, "rank must be a whole number"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_refused(roles: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flora(_named().items(), roles=roles)


def test_roles_of_parameters_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match="roles are known by names"):
        Flora(_named().values(), roles=ROLES)
