# SPDX-License-Identifier: Apache-2.0
"""What programs build from the recipes of docs/hosts: their own functions, as far as they install.

Each test takes the function by which a program makes an optimizer of its config. The rest of the
program, its data and its trainer, is not run.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from tests.hosts.small import LR, Samples, build

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {"rank": 4, "block": 16, "state_dtype": "float32"}


def trained(make: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Weights after three steps of an optimizer."""
    model = build()
    optimizer = make(model)
    assert type(optimizer) is Flora
    tokens = Samples().tokens
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def assert_same_run(make: Callable[[nn.Module], Any], expected: Callable[[nn.Module], Any]) -> None:
    wanted = trained(expected)
    for name, found in trained(make).items():
        assert torch.equal(found, wanted[name]), name


def recipe(page: str, words: str) -> str:
    """The indented block of a page of docs/hosts that has these words."""
    text = (Path(__file__).parents[2] / "docs" / "hosts" / f"{page}.md").read_text("utf-8")
    found = re.findall(r"(?:^ {4}.*\n|(?<=\n)\n(?= {4}))+", text, re.MULTILINE)
    (block,) = [b for b in map(textwrap.dedent, found) if words in b]
    return str(block)


def needs(module: str, page: str) -> Any:
    return pytest.importorskip(
        module, reason=f"{module} cannot be imported (docs/hosts/{page}.md)", exc_type=ImportError
    )


def test_verl_builds_flora_of_its_config() -> None:
    theirs = needs("verl.workers.config.optimizer", "rl_and_moe")
    config = theirs.FSDPOptimizerConfig(
        lr=LR,
        weight_decay=0.1,
        optimizer="by_position",
        optimizer_impl="flora_dist",
        override_optimizer_config=SETTINGS,
    )
    assert_same_run(
        lambda model: theirs.build_optimizer(model.parameters(), config),
        lambda model: flora_dist.by_position(
            model.parameters(), lr=LR, weight_decay=0.1, **SETTINGS
        ),
    )


def test_nemo_automodel_builds_flora_of_a_target() -> None:
    theirs = needs("nemo_automodel.components.optim.optimizer", "fine_tuning")
    block = yaml.safe_load(recipe("fine_tuning", "_target_:"))["optimizer"]
    target = block.pop("_target_")
    assert_same_run(
        lambda model: theirs.build_optimizer(model, (target, block))[0],
        lambda model: flora_dist.by_position(model.parameters(), **block),
    )


def test_axolotl_imports_the_plugin_after_which_the_word_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = needs("axolotl.integrations.base", "fine_tuning")
    plugin = recipe("fine_tuning", "class FloraPlugin")
    (tmp_path / "flora_plugin.py").write_text(plugin, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load(recipe("fine_tuning", "plugins:"))
    manager = theirs.PluginManager.get_instance()
    for name in config["plugins"]:
        manager.register(name)
    assert [type(each).__name__ for each in manager.plugins.values()] == ["FloraPlugin"]
    from transformers.training_args import OptimizerNames

    assert OptimizerNames(config["optimizer"]).value == "flora"
