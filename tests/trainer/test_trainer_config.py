# SPDX-License-Identifier: Apache-2.0
"""Config files: what they accept, and how they name what they do not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from flora_dist import cli
from flora_dist.trainer.config import Config, OptimizerConfig, ScheduleConfig
from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.configfile import as_yaml, load_config
from flora_dist.trainer.optimizers import build_optimizer, schedule_factor
from flora_dist.trainer.optional_imports import needs_train_extra
from tests.trainer.support import ENVIRONMENT, ROOT, TINY

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    assert load_config(path).output.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_written_config_reads_back_as_the_same_run(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(as_yaml(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.step=3", "'train.steps'"),
        ("optimiser.lr=1", "'optimizer'"),
        ("optimizer.weight_deca=1", "'optimizer.weight_decay'"),
        ("sequence_length=64", "'data.sequence_length'"),
        ("data.tokeniser=byte", "'data.tokenizer'"),
        ("optimizer.learning_rate=1e-3", "'optimizer.lr'"),
        ("train.batch_size=8", "'train.global_batch'"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown. Did you mean {nearest}"):
        load_config(TINY, [override])


def test_floras_own_knobs_are_the_keys_of_its_section() -> None:
    config = load_config(
        TINY, ["optimizer={name: flora, lr: 1e-2}", "optimizer.rank=4", "optimizer.momentum=none"]
    )
    assert config.optimizer.options == {"lr": 1e-2, "rank": 4, "momentum": "none"}
    with pytest.raises(ValueError, match=r"Did you mean 'optimizer.kappa'"):
        load_config(TINY, ["optimizer={name: flora, lr: 1e-2, kapa: 3}"])


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    config = load_config(
        TINY, ["train.steps=7", "train.steps=9", "compare={name: adamw, lr: 1e-3}", "compare.lr=3"]
    )
    assert config.train.steps == 9
    assert config.compare == OptimizerConfig(name="adamw", options={"lr": 3})
    assert load_config(TINY, ["compare={name: adamw, lr: 1}", "compare=null"]).compare is None


def test_an_exponent_without_a_dot_is_a_number() -> None:
    assert load_config(TINY, ["optimizer.lr=1e-3"]).optimizer.options["lr"] == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", "train.steps must be of type int; it is 'many' \\(str\\)"),
        ("train.steps=true", "train.steps must be of type int; it is True"),
        ("train.steps=1.5", "train.steps must be of type int"),
        ("train.steps=0", "train.steps must be at least 1"),
        ("train.max_grad_norm=.nan", "must be finite"),
        ("train.max_grad_norm=0", "must be above 0"),
        ("train.micro_batch=3", "multiple of train.micro_batch"),
        ("data.corpus=5", "data.corpus must be of type str"),
        ("data=5", "data must be a section"),
        ("data=null", "data must be a section with keys; it is None. Indent its keys below it"),
        ("backend.changes=[1]", "backend.changes must be of type Mapping; it is \\[1\\]"),
        ("train={steps: 0, stepps: 1}", "'train.stepps' is unknown. Did you mean 'train.steps'"),
        ("evaluation={1: 2}", "'evaluation.1' is unknown"),
        ("optimizer={name: adamw, lr: 1, options: {}}", "'optimizer.options' is unknown"),
        ("output.overwrite=1", "must be of type bool"),
        ("backend.name=fsdp", "one of none, ddp, fsdp1.*; it is 'fsdp'. Did you mean 'fsdp"),
        ("backend.shard=2", "belong to hsdp"),
        ("backend={name: ddp, cpu_offload: true}", "belongs to fsdp2 and hsdp.*'ddp'"),
        ("backend={name: hsdp, shard: 2}", "hsdp needs backend.replicate"),
        ("schedule.warmup_steps=6", "below train.steps"),
        ("schedule.final_ratio=2", "between 0 and 1"),
        ("optimizer.lr=.nan", "finite and at least 0; adamw has lr=nan"),
        ("optimizer.lr=-1", "finite and at least 0"),
        ("optimizer.lr=fast", "a learning rate that is a number"),
        ("optimizer={name: adamw}", "a learning rate that is a number; lr=None"),
        ("optimizer.name=adam", "Did you mean 'adamw'"),
        ("compare={name: adafactor, lr: 1}", "compare runs AdamW"),
        ("model={}", "exactly one of config and pretrained"),
        ("model.pretrained=configs", "exactly one of config and pretrained"),
        ("output.name=a/b", "plain name of a folder"),
        ("data.corpus=no/such/file", "data.corpus must name something that exists; 'no/such/file'"),
        ("data.tokenizer=no-folder", "data.tokenizer must name something that exists"),
        ("model.config=nothing.json", "model.config must name something that exists"),
        ("checkpoint.resume=nowhere", "checkpoint.resume must name something that exists"),
        ("train.steps", "--set takes section.key=value"),
        ("train.steps.x=1", "goes through 'steps', which is not a section"),
        ("train.steps=[1", "the value of --set train.steps must be YAML"),
    ],
)
def test_a_wrong_value_gets_an_error_that_names_key_and_value(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(TINY, [override])


def test_a_missing_required_key_is_named(write_config: Callable[[dict[str, Any]], Path]) -> None:
    tree = yaml.safe_load(TINY.read_text())
    del tree["train"]["steps"]
    with pytest.raises(ValueError, match=r"train.steps is required and missing"):
        load_config(write_config(tree))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("train: {steps: 1}\ntrain: {steps: 2}\n")
    with pytest.raises(ValueError, match="'train' appears twice"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  config: [1\n data: x: y\n", "expected ',' or ']', but got ':' at line 3"),
        ("model:\n\tconfig: x\n", r"cannot start any token at line 2, column 1\. Correct"),
        ("model: \x07", "special characters are not allowed"),
    ],
)
def test_text_that_is_no_yaml_is_answered_in_one_line_with_the_place(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_config(tmp_path / "broken.yaml")
    assert "\n" not in str(caught.value)


def test_a_config_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--config must name a file"):
        load_config(tmp_path / "none.yaml")


def test_a_config_file_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"# caf\xe9\n" + TINY.read_bytes())
    with pytest.raises(ValueError, match=r"latin.yaml' has the byte 0xe9 at offset 5"):
        load_config(path)


def test_a_path_is_found_beside_the_config_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_config(TINY).model.config
    assert found is not None
    assert Path(found).resolve() == ROOT / "configs" / "model" / "llama_tiny.json"


def test_every_field_of_the_config_is_explained() -> None:
    explained = (ROOT / "configs" / "README.md").read_text()
    for section in dataclasses.fields(Config):
        assert f"`{section.name}`" in explained
    for kind in filter(dataclasses.is_dataclass, get_type_hints(Config).values()):
        for each in dataclasses.fields(kind):
            assert f"`{each.name}`" in explained, (kind, each.name)


def test_wsd_stays_at_lr_and_falls_in_its_last_steps_alone() -> None:
    schedule = ScheduleConfig(name="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.2)
    values = [schedule_factor(schedule, 20)(step) for step in range(20)]
    assert values[:2] == [0.5, 1.0]
    assert values[2:16] == [1.0] * 14
    assert values[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    with pytest.raises(ValueError, match="decay_steps belongs to wsd"):
        ScheduleConfig(name="cosine", decay_steps=4)


def test_values_refuse_to_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(config="x").config = "y"


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_every_schedule_warms_up_linearly_and_ends_at_its_ratio(name: Any) -> None:
    schedule = ScheduleConfig(name=name, warmup_steps=4, final_ratio=0.25)
    factor = schedule_factor(schedule, 20)
    values = [factor(step) for step in range(20)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4] == 1.0
    assert values[-1] == pytest.approx(1.0 if name == "constant" else 0.25, abs=1e-15)
    assert all(a >= b for a, b in pairwise(values[4:]))


def test_an_option_the_optimizer_refuses_is_the_users_error() -> None:
    import torch

    wrong = OptimizerConfig(name="adamw", options={"lr": 1.0, "betas": "high"})
    with pytest.raises(ValueError, match="adamw refuses its options"):
        build_optimizer(wrong, [("w", torch.nn.Parameter(torch.ones(2)))], seed=0)


def test_the_command_line_reports_a_mistake_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", "--config", str(TINY), "--set", "train.step=3"]) == 2
    assert capsys.readouterr().err.startswith("error: a config holds only known keys")


def test_the_command_the_planner_and_the_launcher_are_imported_without_the_trainers_packages() -> (
    None
):
    code = (
        "import sys, flora_dist, flora_dist.cli, flora_dist.cluster.planner, "
        "flora_dist.cluster.launch; "
        "sys.exit(bool({'torch', 'yaml', 'pydantic'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("yaml", "flora_dist.trainer.configfile"),
        ("pydantic", "flora_dist.trainer.config"),
        ("numpy", "flora_dist.trainer.data"),
    ],
)
def test_a_missing_package_is_answered_with_the_extra_to_install(
    package: str,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in (module, *(f"flora_dist.trainer.{n}" for n in ("configfile", "preflight", "run"))):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert cli.main(["train", "--config", str(TINY)]) == 2
    said = capsys.readouterr().err
    assert f"needs the package {package!r}" in said
    assert 'pip install "flora-dist[train]"' in said


def test_our_own_import_errors_are_not_blamed_on_the_extra() -> None:
    with pytest.raises(ModuleNotFoundError), needs_train_extra():
        import flora_dist.no_such_module  # noqa: F401
