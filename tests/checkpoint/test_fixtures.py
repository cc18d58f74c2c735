# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that an earlier tree has written load with every bit that their runs held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flora_dist import checkpoint
from flora_dist.checkpoint.contents import SETTINGS
from flora_dist.core.state.settings import completed
from tests.checkpoint.fixtures.runs import EXTRA, KEPT, STEPS, Kept, bits, build, held
from tests.conftest import pool_of

HOME = Path(__file__).parent / "fixtures" / "v1"


def expected_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HOME / name / "expected.json").read_text(encoding="utf-8"))
    return found


def loaded(kept: Kept, name: str, *, sharded: bool) -> dict[str, Any]:
    """All that a fresh run holds once it has loaded a fixture, in JSON's own types."""
    model, optimizer = build(kept, sharded=sharded)
    optimizer.param_groups[0]["lr"] = 0.5
    found = checkpoint.load(HOME / name, model, optimizer)
    assert (found.step, found.path.name) == (STEPS, f"step-{STEPS:08d}")
    extra = {key: value for key, value in found.extra.items() if key != "deepspeed"}
    assert extra == EXTRA
    again: dict[str, Any] = json.loads(json.dumps(bits(held(model, optimizer))))
    return again


def _sorted(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"names": sorted(group["names"]), "settings": group["settings"]} for group in groups]


def _unlike(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Keys of what differs; in ZeRO's groups the order of names is the engine's."""
    groups = [_sorted(each["groups"]) for each in (found, wanted)]
    for group in groups[1]:  # a setting younger than the fixture has its default
        whole = completed(group["settings"])
        if whole is not None:  # None: another optimizer's
            group["settings"] = {name: whole[name] for name in SETTINGS}
    different = [] if groups[0] == groups[1] else ["groups"]
    for kind in ("tensors", "parameters"):
        assert found[kind].keys() == wanted[kind].keys()
        different += [key for key in wanted[kind] if found[kind][key] != wanted[kind][key]]
    return different


@pytest.mark.parametrize("name", KEPT)
def test_a_fixture_loads_on_one_process_bit_for_bit(name: str) -> None:
    assert _unlike(loaded(KEPT[name], name, sharded=False), expected_of(name)) == []


def _on_two_ranks() -> dict[str, list[str]]:
    return {
        name: _unlike(loaded(kept, name, sharded=True), expected_of(name))
        for name, kept in KEPT.items()
    }


@pytest.mark.ranks(2)
def test_every_fixture_loads_on_two_ranks_bit_for_bit() -> None:
    assert pool_of(2)(_on_two_ranks) == [{name: [] for name in KEPT}] * 2
