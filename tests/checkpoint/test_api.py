# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: what comes back, what is refused and stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flora_dist
from flora_dist import Flora, checkpoint
from tests.battery.variants import differing
from tests.checkpoint.two import SETTINGS, Two, everything, train, trained

# ---- what comes back


def test_weights_buffers_state_settings_and_extra_come_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = 0.123
    extra = {"epoch": 2, "rate": 0.1, "list": [1, None, "x"]}
    path = checkpoint.save(tmp_path, model, optimizer, step=7, extra=extra)
    other, fresh = trained(steps=1, lr=0.5)
    loaded = checkpoint.load(tmp_path, other, fresh)
    assert (loaded.path, loaded.step, loaded.extra) == (path, 7, extra)
    assert differing(everything(other, fresh), everything(model, optimizer)) == []


def test_buffers_that_are_not_persistent_are_left_out(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, model, optimizer, step=1)
    saved = checkpoint.api.folders.read_manifest(path)
    assert {key for key in saved.tensors if key.startswith("model.")} == {
        "model.linear.weight",
        "model.linear.bias",
        "model.count",
    }


def test_a_run_that_has_not_stepped_comes_back_without_state(tmp_path: Path) -> None:
    model, optimizer = trained(steps=0)
    checkpoint.save(tmp_path, model, optimizer, step=0)
    other, fresh = trained(steps=3)
    checkpoint.load(tmp_path, other, fresh)
    assert not fresh.state


def test_parameters_and_buffers_without_elements_are_no_trouble(tmp_path: Path) -> None:
    for _ in range(2):
        model, _unused = trained(steps=0)
        model.register_parameter("none", torch.nn.Parameter(torch.empty(0, 4)))
        model.register_buffer("nothing", torch.empty(0))
        optimizer = Flora(model.named_parameters(), **SETTINGS)
        train(model, optimizer, 1)
        if checkpoint.latest(tmp_path) is None:
            checkpoint.save(tmp_path, model, optimizer, step=1)
            before = everything(model, optimizer)
    checkpoint.load(tmp_path, model, optimizer)
    assert differing(everything(model, optimizer), before) == []


def test_low_weights_are_rounded_from_full_ones(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, step=2)
    low = Two().bfloat16()
    checkpoint.load(tmp_path, low, Flora(low.named_parameters(), **SETTINGS))
    assert torch.equal(low.linear.weight, model.linear.weight.bfloat16())


def test_latest_and_keep(tmp_path: Path) -> None:
    model, optimizer = trained()
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, model, optimizer, step=step, keep=2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000003"
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_other_optimizers_of_torch(kind: Any, tmp_path: Path) -> None:
    model = Two()
    optimizer = kind(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    checkpoint.save(tmp_path, model, optimizer, step=2)
    train(model, optimizer, 2)
    other = Two(24)
    fresh = kind(other.parameters(), lr=0.5)
    checkpoint.load(tmp_path, other, fresh)
    train(other, fresh, 2)
    assert differing(other.state_dict(), model.state_dict()) == []


# ---- what is refused


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"tag": "../elsewhere"}, {"tag": ""}])
def test_a_wrong_keep_or_tag_is_refused_before_anything_is_written(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    model, optimizer = trained()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        checkpoint.save(tmp_path / "new", model, optimizer, step=1, **wrong)
    assert not (tmp_path / "new").exists()


def _wrong_seed() -> tuple[nn.Module, Flora, str]:
    return *trained(seed=1), "seed"


def _wrong_columns() -> tuple[nn.Module, Flora, str]:
    model = Two(25)
    return model, Flora(model.named_parameters(), **SETTINGS), "linear.weight"


def _missing() -> tuple[nn.Module, Flora, str]:
    model = nn.Sequential(nn.Linear(24, 10))
    return model, Flora(model.named_parameters(), **SETTINGS), "0.bias"


def _wide() -> tuple[nn.Module, Flora, str]:
    model = Two().double()
    return model, Flora(model.named_parameters(), **SETTINGS), "float64"


def _frozen() -> tuple[nn.Module, Flora, str]:
    model, optimizer = trained()
    model.linear.weight.requires_grad_(False)
    return model, optimizer, "frozen"


def _sketched() -> tuple[nn.Module, Flora, str]:
    model, optimizer = trained(steps=0)
    flora_dist.attach(model, optimizer, "compressed")
    return model, optimizer, "gradients='compressed'"


def _adamw() -> tuple[nn.Module, Any, str]:
    model = Two()
    return model, torch.optim.AdamW(model.parameters()), "same tensors"


@pytest.mark.parametrize(
    "build", [_wrong_seed, _wrong_columns, _missing, _wide, _frozen, _sketched, _adamw]
)
def test_another_run_is_refused_and_stays_as_it_is(
    build: Callable[[], tuple[nn.Module, Any, str]], tmp_path: Path
) -> None:
    checkpoint.save(tmp_path, *trained(), step=2)
    model, optimizer, named = build()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=named):
        checkpoint.load(tmp_path, model, optimizer)
    if isinstance(optimizer, Flora):
        assert differing(everything(model, optimizer), before) == []


@pytest.mark.parametrize("call", ["save", "load"])
def test_between_the_micro_batches_of_a_sketched_step_it_is_refused(
    call: str, tmp_path: Path
) -> None:
    model, optimizer = trained(steps=0)
    flora_dist.attach(model, optimizer, "compressed")
    train(model, optimizer, 1)
    checkpoint.save(tmp_path, model, optimizer, step=1)
    model(torch.ones(4, 24)).backward()
    calls = {
        "save": lambda: checkpoint.save(tmp_path, model, optimizer, step=2),
        "load": lambda: checkpoint.load(tmp_path, model, optimizer),
    }
    with pytest.raises(ValueError, match="between steps"):
        calls[call]()
    optimizer.zero_grad()
    checkpoint.save(tmp_path, model, optimizer, step=2)
    checkpoint.load(tmp_path, model, optimizer)


def test_how_sketched_gradients_come_about_may_change(tmp_path: Path) -> None:
    ends = []
    for level in ("compressed", "fused"):
        model, optimizer = trained(steps=0)
        flora_dist.attach(model, optimizer, level, gradient_bits=32)
        if level == "compressed":
            train(model, optimizer, 2)
            checkpoint.save(tmp_path, model, optimizer, step=2)
        else:
            checkpoint.load(tmp_path, model, optimizer)
        train(model, optimizer, 2)
        ends.append(model.linear.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)  # fused sums in another order
