# SPDX-License-Identifier: Apache-2.0
"""``launch/gpu.sh`` at toy size on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import gpu_table
from tests.harness.launched import ROOT


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["launch/gpu.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_slice_is_rehearsed_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = str(tmp_path)
    first = launch("--rehearse", "--out", out, "--slice", "sketch")
    assert first.returncode == 0, first.stdout + first.stderr
    done = launch("--rehearse", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sketch    has passed before" in done.stdout
    for name in ("60m", "130m"):
        trained = launch("--rehearse", "--out", out, "--slice", name)
        assert trained.returncode == 0, trained.stdout + trained.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(gpu_table.SLICES)
    shown = "\n".join(gpu_table.lines_of(gpu_table.read(tmp_path)))
    assert "Flora, blend, recorded" in shown
    assert "Flora, orthogonal tiles" in shown
    assert [name for name, one in found.items() if one["faults"] or not one["rehearsal"]] == []


def test_a_slice_is_rehearsed_and_its_result_is_a_file(tmp_path: Path) -> None:
    done = launch("--rehearse", "--out", str(tmp_path), "--slice", "sketch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "sketch.json").read_text())["faults"] == []


def test_an_unknown_slice_is_refused_with_the_names_of_all() -> None:
    done = launch("--slice", "speed")
    assert done.returncode == 2
    assert (
        "must be one of bits runs records graph marked step sketch training 60m 130m" in done.stderr
    )
