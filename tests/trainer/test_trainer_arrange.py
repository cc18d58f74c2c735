# SPDX-License-Identifier: Apache-2.0
"""What of a network trains, and how it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flora_dist.cli import main
from flora_dist.trainer.arrange import arranged, layers_of
from flora_dist.trainer.config import Config
from flora_dist.trainer.config_data import LoraConfig, ModelConfig
from flora_dist.trainer.model import build_model, read_network
from flora_dist.trainer.run import run
from flora_dist.trainer.trained import weights_of
from tests.trainer.support import ROOT, metrics

Tiny = Callable[..., Config]
TINY_MODEL = str(ROOT / "configs" / "model" / "llama_tiny.json")
FLORA = "optimizer={name: flora, lr: 1e-2}"


def built(**settings: object) -> nn.Module:
    config = ModelConfig(config=TINY_MODEL, **settings)  # type: ignore[arg-type]
    network = read_network(Path(TINY_MODEL))
    return arranged(build_model(config, network, seed=0), config)


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12)
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def test_frozen_parameters_stand_still_and_the_others_train(tiny: Tiny, tmp_path: Path) -> None:
    frozen = 'model.frozen=["model.embed_tokens.*", "*.layers.0.*"]'
    assert run(tiny(FLORA, frozen, "checkpoint.every=6")) == 0
    before = built().state_dict()
    after = weights_of(tmp_path / "tiny")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {n for n in before if n.startswith(("model.embed_tokens.", "model.layers.0."))}


def test_patterns_that_name_nothing_or_everything_are_refused() -> None:
    with pytest.raises(ValueError, match=r"none is like 'embed'.*model\.embed_tokens\.weight"):
        built(frozen=("embed",))
    with pytest.raises(ValueError, match="something must be left to train"):
        built(frozen=("*",))
    with pytest.raises(ValueError, match=r"model\.lora freezes the whole network"):
        built(frozen=("*",), lora=LoraConfig(rank=2))


def test_adapters_train_alone_resume_and_are_exported_merged(tiny: Tiny, tmp_path: Path) -> None:
    lora = ("model.lora={rank: 4, targets: [q_proj, down_proj]}", "optimizer.lr=5e-2")
    assert run(tiny(*lora, "train.steps=3", "checkpoint.every=3")) == 0
    resumed = (*lora, "train.steps=6", "checkpoint={every: 3, resume: auto}")
    assert run(tiny(*resumed, "output.overwrite=true")) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "tiny")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.02
    weights, start = weights_of(tmp_path / "tiny"), built().state_dict()
    moved = {name for name in weights if "lora_" in name and bool(weights[name].any())}
    assert len(moved) == 2 * 2 * 2  # two layers, two targets, two factors
    for name, value in weights.items():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, start[plain]), name

    out = tmp_path / "merged"
    assert main(["export", str(tmp_path / "tiny"), str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    adapted = built(lora=LoraConfig(rank=4, targets=("q_proj", "down_proj")))
    adapted.load_state_dict(weights)
    torch.testing.assert_close(loss_of(merged.eval()), loss_of(adapted.eval()))
    with pytest.raises(ValueError, match=r"model\.lora\.targets must name linear layers"):
        built(lora=LoraConfig(rank=2, targets=("nothing",)))


def test_checkpointing_and_attention_change_how_it_computes_and_not_what() -> None:
    plain = built()
    wanted = torch.autograd.grad(loss_of(plain), list(plain.parameters()))
    calls: list[str] = []
    for name, settings in {"kept": {}, "again": {"checkpointing": True}}.items():
        model = built(attention="eager", **settings)
        assert model.config._attn_implementation == "eager"
        layers_of(model)[0].mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        found = torch.autograd.grad(loss_of(model), list(model.parameters()))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    assert calls == ["kept", "again", "again"]
    with pytest.raises(ValueError, match=r"model\.attention must work on this model and machine"):
        built(attention="flash_attention_2")


def test_compiled_layers_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = loss_of(built())
    # The graphs are torch's own; inductor would take half a minute to turn them into C++.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    model = built(compile=True)
    compiled = [layer._compiled_call_impl is not None for layer in layers_of(model)]
    assert compiled == [True, True]
    loss = loss_of(model)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.state_dict().keys() == built().state_dict().keys()
