# SPDX-License-Identifier: Apache-2.0
"""FSDP1 and DeepSpeed: what contradicts the run's config is refused before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import as_yaml, load_config
from flora_dist.trainer.deepspeed_json import engine_settings
from flora_dist.trainer.run import run
from tests.trainer.support import ROOT

Tiny = Callable[..., Config]
Settings = Callable[..., dict[str, Any]]
JSONS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
FLORA = "optimizer={name: flora, lr: 1e-2}"
BLOCK = {"type": "Flora", "params": {"lr": 1e-2}}


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path) -> Settings:
    """What DeepSpeed gets on 2 processes from a JSON and overrides of the tiny config."""

    def make(tree: dict[str, Any] | str, *overrides: str) -> dict[str, Any]:
        path = tmp_path / "zero.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        backend = f"backend={{name: deepspeed, config: {path}}}"
        return engine_settings(tiny(backend, FLORA, *overrides), 2)

    return make


def test_what_the_json_leaves_out_or_calls_auto_comes_from_the_run(settings: Settings) -> None:
    filled = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
    }
    auto = {**dict.fromkeys(filled, "auto"), "bf16": {"enabled": "auto"}}
    zero = {"zero_optimization": {"stage": 2}}
    assert settings(zero) == settings(zero | auto) == zero | filled
    other = settings(
        {"bf16": {"immediate_grad_update": True}},
        "train.max_grad_norm=0.5",
        "train.precision=bfloat16",
        "train.micro_batch=1",
    )
    assert other["gradient_clipping"] == 0.5
    assert other["gradient_accumulation_steps"] == 4
    assert other["bf16"] == {"immediate_grad_update": True, "enabled": True}


def test_what_the_json_says_alike_may_stand(settings: Settings) -> None:
    same = {"train_batch_size": 8, "gradient_clipping": 0, "bf16": {"enabled": False}}
    got = settings({**same, "optimizer": BLOCK, "flora": {"gradients": "dense"}})
    assert "optimizer" not in got  # the run builds it
    assert got["flora"] == {"gradients": "dense"}


def test_roles_stand_in_both_alike_or_are_refused(settings: Settings) -> None:
    roles = {"head": {"rank": None, "state_dtype": "bfloat16"}}
    section = (
        "optimizer={name: flora, lr: 1e-2, roles: {head: {rank: null, state_dtype: bfloat16}}}"
    )
    block = {"type": "Flora", "params": {"lr": 1e-2, "roles": roles}}
    assert "optimizer" not in settings({"optimizer": block}, section)
    with pytest.raises(ValueError, match=r"'optimizer' says .*, the optimizer section .*'roles'"):
        settings({"optimizer": BLOCK}, section)
    with pytest.raises(ValueError, match=r"'optimizer' says .*'roles'.*, the optimizer section"):
        settings({"optimizer": block})


def test_a_block_that_is_off_may_stand(settings: Settings) -> None:
    off = {"enabled": False, "loss_scale": 0}
    assert settings({"fp16": off, "torch_autocast": {"enabled": False}})["fp16"] == off


def test_changes_are_laid_over_the_json_and_null_takes_out(settings: Settings) -> None:
    tree = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_clipping": 1.0}
    got = settings(
        tree,
        "backend.changes.gradient_clipping=null",
        "backend.changes.zero_optimization.stage=3",
        "backend.changes.data_types={grad_accum_dtype: fp32}",
    )
    assert got["gradient_clipping"] == 0.0
    assert got["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert got["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train_batch_size": 16}, r"'train_batch_size' is 16, but train.global_batch makes it 8"),
        ({"train_micro_batch_size_per_gpu": 4}, r"is 4, but train.micro_batch makes it 2"),
        ({"gradient_accumulation_steps": 1}, r"is 1, but .* x 2 processes\) makes it 2"),
        ({"gradient_clipping": 1.0}, r"is 1.0, but train.max_grad_norm makes it 0.0"),
        ({"bf16": {"enabled": True}}, r"'bf16.enabled' is True, but train.precision makes it Fal"),
        ({"bfloat16": {"enabled": True}}, r"'bfloat16' is not for the trainer: it is the old"),
        ({"bf16": True}, r"'bf16' must be an object; it is True"),
        ({"fp16": {"enabled": True}}, r"'fp16' is not for the trainer: steps that overflow"),
        ({"fp16": {"enabled": "auto"}}, r"'fp16' is not for the trainer"),
        ({"torch_autocast": {"enabled": True}}, r"train.precision says the arithmetic"),
        ({"scheduler": {"type": "WarmupLR"}}, r"the schedule section moves the learning rate"),
        ({"optimizer": {"type": "Flora", "params": {"lr": 1}}}, r"'optimizer' says .*'lr': 1}"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}, r"the optimizer section {'type"),
        ({"zero_optimisation": {"stage": 2}}, r"Did you mean 'zero_optimization'"),
        ({"gradient_cliping": 1.0}, r"Did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"must be filled in"),
        ({"flora": {"gradient": "dense"}}, r"unknown key 'gradient'. Did you mean 'gradients'"),
        ({"flora": {"gradients": "sparse"}}, r"must be one of dense"),
        ({"flora": 3}, r"must be an object"),
        ("[]", r"must be a JSON object"),
        ("{", r"must be JSON"),
        ('{"flora": {}, "flora": {}}', r"'flora' appears twice"),
    ],
)
def test_a_json_that_contradicts_the_run_is_refused(
    tree: dict[str, Any] | str, message: str, settings: Settings
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tree)


def test_a_change_that_takes_nothing_out_names_the_nearest(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"it has no 'optimiser'. Did you mean 'optimizer'"):
        settings({"optimizer": BLOCK}, "backend.changes.optimiser=null")
    with pytest.raises(ValueError, match=r"it has no 'zero_optimization.stages'"):
        settings({"zero_optimization": {}}, "backend.changes.zero_optimization.stages=null")


@pytest.mark.deepspeed
def test_an_unknown_key_of_zero_is_found_before_anything_is_written(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap": true}}')
    with pytest.raises(ValueError, match=r"zero_optimization.overlap=True: Extra inputs are not"):
        run(tiny(f"backend={{name: deepspeed, config: {path}}}"))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
            "does not work with elastic",
        ),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer"),
    ],
)
def test_what_flora_cannot_go_with_is_found_before_anything_is_written(
    tree: dict[str, Any], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    # Incident: it was found by the engine, after overwrite had removed the folder of the last run.
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(tree))
    config = tiny(f"backend={{name: deepspeed, config: {path}}}", FLORA)
    with pytest.raises(ValueError, match=words):
        run(config)
    assert not Path(config.output.folder, config.output.name).exists()


def test_without_deepspeed_the_error_names_the_extra(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "zero.json"
    path.write_text("{}")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"'deepspeed', .* \"flora-dist\[train,deepspeed\]\""):
        run(tiny(f"backend={{name: deepspeed, config: {path}}}"))


@pytest.mark.parametrize("key", ["every: 2", "resume: configs"])
@pytest.mark.parametrize("name", ["name: fsdp1", "name: deepspeed, config: configs"])
def test_checkpoints_of_flat_parts_are_refused_before_anything_is_written(
    name: str, key: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"in flat parts only Flora .*Set both to null, or"):
        run(tiny(f"backend={{{name}}}", f"checkpoint={{{key}}}"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["name: fsdp1", "name: deepspeed, config: configs"])
def test_adafactor_is_refused_on_flat_parts(name: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"Adafactor needs whole matrices"):
        run(tiny(f"backend={{{name}}}", "optimizer={name: adafactor, lr: 1e-2}"))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("name: deepspeed", r"deepspeed needs backend.config"),
        ("name: ddp, config: configs", r"belong to deepspeed; backend.name='ddp' has 'configs'"),
        ("name: ddp, changes: {bf16: null}", r"belong to deepspeed"),
        ("name: deepspeed, config: no.json", r"backend.config must name something that exists"),
        ("name: deepspeed, config: configs, changes: 3", r"backend.changes must be of type"),
        ("name: deepspeeed", r"Did you mean 'deepspeed'"),
    ],
)
def test_a_backend_section_that_does_not_fit_is_refused(
    backend: str, message: str, tiny: Tiny
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(f"backend={{{backend}}}")


def test_a_written_config_keeps_the_changes(tiny: Tiny, tmp_path: Path) -> None:
    path = JSONS[0]
    changes = "{bf16: null, zero_optimization: {stage: 1}}"
    config = tiny(f"backend={{name: deepspeed, config: {path}, changes: {changes}}}")
    copy = tmp_path / "config.yaml"
    copy.write_text(as_yaml(config))
    assert load_config(copy) == config


def test_every_key_of_the_jsons_is_explained_beside_them() -> None:
    explained = (ROOT / "configs" / "deepspeed" / "README.md").read_text()

    def keys(tree: dict[str, Any]) -> set[str]:
        below = [keys(value) for value in tree.values() if isinstance(value, dict)]
        return set(tree).union(*below)

    assert len(JSONS) == 6
    used = set().union(*(keys(json.loads(path.read_text())) for path in JSONS))
    assert {key for key in used if f"`{key}`" not in explained} == set()
