# SPDX-License-Identifier: Apache-2.0
"""Networks of which a process draws its rows alone: the same weights, buffers and random state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from flora_dist.trainer import new_network
from flora_dist.trainer.by_rows import draw_rows
from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.engine import build_learner
from flora_dist.trainer.model import build_model, read_model_config
from flora_dist.trainer.new_network import place_in
from flora_dist.trainer.place import Shard, Unfit
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from flora_dist.trainer.tokenizer import ByteTokenizer
from tests.conftest import pool_of
from tests.trainer.support import TINY, tiny_overrides

Tiny = Callable[..., Config]
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
NETWORKS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES, **_HEADS),
    "tied, with a padding token": Qwen3Config(
        **_SIZES, **_HEADS, tie_word_embeddings=True, pad_token_id=3
    ),
    "experts": MixtralConfig(**_SIZES, **_HEADS, num_local_experts=3),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_all_processes_are_the_whole_network_bit_for_bit(name: str, count: int) -> None:
    torch.manual_seed(7)
    whole = AutoModelForCausalLM.from_config(NETWORKS[name], dtype=torch.float32)
    state, parts = torch.get_rng_state(), []
    for number in range(count):
        place = Shard(number=number, count=count)
        drawn = draw_rows(NETWORKS[name], place, seed=7, dtype=torch.float32)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.is_meta for parameter in drawn.model.parameters())
        pairs = zip(whole.named_buffers(), drawn.model.named_buffers(), strict=True)
        assert all(own == other and torch.equal(a, b) for (own, a), (other, b) in pairs)
        parts.append(drawn.rows)
    assert [n for n, _ in whole.named_parameters()] == list(parts[0])
    for key, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([rows[key] for rows in parts]), parameter)


def filled(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Names of what differs from the whole network once shards are filled: weights, buffers."""
    config = load_config(TINY, overrides)
    world = World(process_rank=dist.get_rank(), size=2, device=torch.device("cpu"))
    network, place = read_model_config(config.model, ByteTokenizer(), 32), place_in(config, world)
    assert place is not None
    drawn = draw_rows(network, place, seed=3, dtype=torch.bfloat16)
    learner = build_learner(drawn.model, config.optimizer, config, world, drawn.rows)
    assert not drawn.rows
    whole = build_model(config.model, network, seed=3, dtype=torch.bfloat16)
    weights = dict(learner.spread.module.named_parameters())
    buffers = dict(learner.spread.module.named_buffers())
    return (
        [n for n, p in whole.named_parameters() if not p.equal(weights[n].full_tensor())],
        [n for n, b in whole.named_buffers() if not b.equal(buffers[n])],
    )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["fsdp2, cpu_offload: true", "hsdp, replicate: 2, shard: 1"])
def test_shards_that_are_filled_make_the_whole_network(
    backend: str, corpus: Path, tmp_path: Path
) -> None:
    overrides = tiny_overrides(corpus, tmp_path, f"backend={{name: {backend}}}")
    overrides.append("optimizer={name: flora, lr: 1e-2}")
    assert pool_of(2)(filled, overrides) == [([], []), ([], [])]


class Computed(nn.Module):
    """A parameter that no operator fills in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(3.0))


class Patched(nn.Module):
    """A parameter that is changed in one row after another has been drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(4, 2)
        self.second = nn.Linear(2, 2)
        nn.init.zeros_(self.first.weight[1])


class Copied(nn.Module):
    """A parameter that is computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight)


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Computed, "elsewhere than in place"), (Patched, "once more"), (Copied, "from another")],
)
def test_a_network_that_is_not_drawn_parameter_after_parameter_is_refused(
    kind: type[nn.Module], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: kind())
    with pytest.raises(RuntimeError, match=said):
        draw_rows(NETWORKS["llama"], Shard(number=0, count=1), seed=0, dtype=torch.float32)


def test_what_cannot_be_drawn_by_rows_is_drawn_whole_and_said_so(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_: Any, **__: Any) -> None:
        raise Unfit("weight is special")

    monkeypatch.setattr(new_network, "draw_rows", unfit)
    assert run(tiny("backend.name=fsdp2", "train.steps=1")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 1 processes draw the whole network: weight is special" in said


def test_only_shards_of_a_new_network_are_drawn_by_rows(tiny: Tiny) -> None:
    world = World(process_rank=5, size=6, device=torch.device("cpu"))
    hsdp = "backend={name: hsdp, replicate: 2, shard: 3}"
    assert place_in(tiny("backend.name=fsdp2"), world) == Shard(number=5, count=6)
    assert place_in(tiny(hsdp), world) == Shard(number=2, count=3)
    assert place_in(tiny("backend.name=ddp"), world) is None
    assert place_in(tiny("backend.name=fsdp2", "model.lora={rank: 2}"), world) is None
