# SPDX-License-Identifier: Apache-2.0
"""Networks from folders of which a process reads its rows alone: the same as loaded whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from flora_dist.trainer import new_network as trainer_network
from flora_dist.trainer.config import Config
from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.engine import build_learner
from flora_dist.trainer.model import build_model, read_network
from flora_dist.trainer.new_network import new_network, place_in
from flora_dist.trainer.place import Shard, Unfit
from flora_dist.trainer.pretrained_rows import read_rows
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from tests.conftest import pool_of
from tests.trainer.support import TINY, metrics, tiny_overrides
from tests.trainer.test_trainer_by_rows import _HEADS, _SIZES, NETWORKS

Tiny = Callable[..., Config]
KINDS = {**NETWORKS, "tied llama": LlamaConfig(**_SIZES, **_HEADS, tie_word_embeddings=True)}
_FILE = "model.safetensors"
_SAID: list[str] = []


def folder_of(kind: str, folder: Path, **options: Any) -> Path:
    """A network of the kind as `save_pretrained` writes it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float32)
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return folder


def tiny_folder(tiny: Tiny, folder: Path) -> Path:
    """A network of the tiny config with an embedding for each byte."""
    torch.manual_seed(1)
    network = read_network(Path(tiny().model.config or ""))
    network.vocab_size = 257
    AutoModelForCausalLM.from_config(network).save_pretrained(folder)
    return folder


def whole_of(folder: Path, dtype: torch.dtype) -> nn.Module:
    config = ModelConfig(config=None, pretrained=str(folder))
    return build_model(config, read_network(folder), seed=0, dtype=dtype)


def check_parts(folder: Path, dtype: torch.dtype, count: int = 3) -> None:
    """Every process's rows together, buffers and random state are those of the whole network."""
    whole, parts = whole_of(folder, dtype), []
    state = torch.get_rng_state()
    for number in range(count):
        place = Shard(number=number, count=count)
        drawn = read_rows(folder, read_network(folder), place, seed=0, dtype=dtype)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.is_meta and p.dtype == dtype for p in drawn.model.parameters())
        for (own, one), (other, same) in zip(
            whole.named_buffers(), drawn.model.named_buffers(), strict=True
        ):
            assert own == other
            assert type(same) is torch.Tensor
            assert one.dtype == same.dtype
            assert torch.equal(one, same)
        parts.append(drawn.rows)
    assert [n for n, _ in whole.named_parameters()] == list(parts[0])
    for key, parameter in whole.named_parameters():
        own = [rows[key] for rows in parts]
        assert torch.equal(torch.cat(own), parameter)
        assert all(each.untyped_storage().nbytes() == each.nbytes for each in own)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_processes_read_are_the_whole_network_bit_for_bit(
    kind: str, tmp_path: Path
) -> None:
    check_parts(folder_of(kind, tmp_path / "one"), torch.float32)
    files = folder_of(kind, tmp_path / "many", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(files.glob("*.safetensors"))) > 1
    check_parts(files, torch.bfloat16)


def test_rows_of_a_body_without_its_head_are_found_by_names_without_prefix(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole: Any = AutoModelForCausalLM.from_config(KINDS["gpt2"])
    whole.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / _FILE)
    check_parts(tmp_path, torch.float32)


def test_tied_weights_that_a_file_holds_twice_are_one_parameter(tmp_path: Path) -> None:
    folder = folder_of("tied llama", tmp_path)
    tensors = load_file(folder / _FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / _FILE, {"format": "pt"})
    check_parts(folder, torch.float32)
    tensors["lm_head.weight"] += 1  # transformers does not tie these
    save_file(tensors, folder / _FILE, {"format": "pt"})
    check_parts(folder, torch.float32)


def filled(overrides: list[str], folders: list[str]) -> dict[str, list[str]]:
    """Names of what differs from the whole network once shards are filled, by folder."""
    found: dict[str, list[str]] = {}
    world = World(process_rank=dist.get_rank(), size=2, device=torch.device("cpu"))
    for folder in folders:
        config = load_config(TINY, [*overrides, f"model={{pretrained: {folder}}}"])
        model, rows = new_network(config, read_network(Path(folder)), world, _SAID.append)
        assert rows is not None
        learner = build_learner(model, config.optimizer, config, world, rows)
        assert not rows
        whole = whole_of(Path(folder), torch.bfloat16)
        module = learner.spread.module
        weights, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        assert list(weights) == [n for n, _ in whole.named_parameters()]
        found[folder] = [
            *(n for n, p in whole.named_parameters() if not p.equal(weights[n].full_tensor())),
            *(n for n, b in whole.named_buffers() if not b.equal(buffers[n])),
        ]
    return found


@pytest.mark.ranks(2)
def test_shards_that_are_filled_from_files_make_the_whole_network(
    corpus: Path, tmp_path: Path
) -> None:
    folders = [str(folder_of(kind, tmp_path / str(i))) for i, kind in enumerate(KINDS)]
    overrides = tiny_overrides(corpus, tmp_path, "backend.name=fsdp2", "model.config=null")
    overrides += ["optimizer={name: flora, lr: 1e-2}", "train.precision=bfloat16-pure"]
    same: dict[str, list[str]] = {folder: [] for folder in folders}
    assert pool_of(2)(filled, overrides, folders) == [same, same]


@pytest.mark.parametrize("backend", ["none", "fsdp2"])
def test_a_folder_that_lacks_a_weight_is_refused(backend: str, tiny: Tiny, tmp_path: Path) -> None:
    saved = tiny_folder(tiny, tmp_path / "saved")
    tensors = load_file(saved / _FILE)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, saved / _FILE, {"format": "pt"})
    loaded = f"model={{pretrained: {saved}}}"
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, 'model\.layers\.0\.mlp"):
        run(tiny(loaded, f"backend.name={backend}"))


def test_a_parameter_that_no_file_fills_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if transformers should say nothing of it."""
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / _FILE)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / _FILE, {"format": "pt"})
    kind = type(AutoModelForCausalLM.from_config(KINDS["llama"]))
    theirs = kind.from_pretrained

    def silent(*args: Any, **kwargs: Any) -> Any:
        return theirs(*args, **kwargs)[0], {"missing_keys": set()}

    monkeypatch.setattr(kind, "from_pretrained", silent)
    with pytest.raises(Unfit, match=r"model\.norm\.weight gets its values elsewhere"):
        read_rows(folder, read_network(folder), Shard(number=0, count=1), seed=0, dtype=torch.float)


def test_other_files_than_safetensors_are_loaded_whole_and_that_is_said(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    torch.save(load_file(folder / _FILE), folder / "pytorch_model.bin")
    (folder / _FILE).unlink()
    config = load_config(TINY, [f"model={{pretrained: {folder}}}", "backend.name=fsdp2"])
    world, said = World(process_rank=0, size=2, device=torch.device("cpu")), list[str]()
    model, rows = new_network(config, read_network(folder), world, said.append)
    assert rows is None
    whole = dict(whole_of(folder, torch.float32).named_parameters())
    assert all(torch.equal(p, whole[n]) for n, p in model.named_parameters())
    assert len(said) == 1
    assert "1 of 2 processes load the whole network" in said[0]
    assert "has neither model.safetensors nor model.safetensors.index.json" in said[0]


@pytest.mark.parametrize("kind", ["tied llama", "experts"])
def test_a_network_without_float32_comes_to_be_in_its_own_precision(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(kind, tmp_path / "saved")
    world = World(process_rank=0, size=2, device=torch.device("cpu"))
    for model in (f"{{pretrained: {folder}}}", f"{{config: {folder / 'config.json'}}}"):
        overrides = [f"model={model}", "backend.name=ddp", "train.precision=bfloat16-pure"]
        config = load_config(TINY, [*overrides, "optimizer={name: flora, lr: 1e-2}"])
        whole = build_model(
            config.model, read_network(folder), seed=config.train.seed, dtype=torch.bfloat16
        )
        with monkeypatch.context() as patched:
            patched.delattr(trainer_network, "build_model")
            own, rows = new_network(config, read_network(folder), world, _SAID.append)
        assert rows is None
        assert own.training
        for (one, first), (other, second) in zip(
            (*whole.named_parameters(), *whole.named_buffers()),
            (*own.named_parameters(), *own.named_buffers()),
            strict=True,
        ):
            assert one == other
            assert (first.dtype, first.requires_grad) == (second.dtype, second.requires_grad)
            assert torch.equal(first, second)


def test_a_run_from_shards_read_by_rows_takes_the_same_steps(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tiny_folder(tiny, tmp_path / "saved")
    told = [f"model={{pretrained: {saved}}}", "backend.name=fsdp2", "train.steps=2"]
    assert run(tiny(*told, "output.name=rows")) == 0
    monkeypatch.setattr(trainer_network, "place_in", lambda *_: None)
    assert run(tiny(*told, "output.name=whole")) == 0
    found = {name: metrics(tmp_path / name) for name in ("rows", "whole")}
    assert [r["loss"] for r in found["rows"]] == [r["loss"] for r in found["whole"]]


def test_adapters_on_shards_need_the_whole_network_first(tiny: Tiny, tmp_path: Path) -> None:
    saved = tiny_folder(tiny, tmp_path / "saved")
    lora = f"model={{pretrained: {saved}, lora: {{rank: 2}}}}"
    config = tiny(lora, "backend.name=fsdp2", "train.steps=2")
    world = World(process_rank=0, size=1, device=torch.device("cpu"))
    assert place_in(config, world) is None
    assert run(config) == 0
