# SPDX-License-Identifier: Apache-2.0
"""A wheel made where nothing compiles has no kernels, steps with torch, and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flora_dist.kernels.presence import REMEDY
from tests.harness.launched import ROOT

TWO_STEPS = """
import torch
from flora_dist import Flora

weight = torch.nn.Parameter(torch.zeros(16, 32))
optimizer = Flora([("weight", weight)], lr=0.01)
for _ in range(2):
    weight.grad = torch.ones(16, 32)
    optimizer.step()
assert bool((weight != 0.0).all()), weight
"""


def _made_without(tmp_path: Path, lack: dict[str, str]) -> tuple[Path, str]:
    """The wheel of a copy of our sources, and what was said while it was made."""
    sources = tmp_path / "sources"
    without_library = shutil.ignore_patterns("kernels-*.so", "__pycache__")
    shutil.copytree(ROOT / "flora_dist", sources / "flora_dist", ignore=without_library)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(
        command, cwd=sources, env=os.environ | lack, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("lack", "cause"),
    [
        ({"CXX": "false"}, "the compiler has refused with exit code 1"),
        ({"CXX": "", "PATH": "/nowhere"}, "a C++ compiler must be on the path"),
    ],
    ids=["refuses", "missing"],
)
def test_a_wheel_made_without_a_compiler_is_pure_and_the_build_says_why(
    lack: dict[str, str], cause: str, tmp_path: Path
) -> None:
    wheel, said = _made_without(tmp_path, lack)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")] == []
    assert said.count("the wheel has no compiled kernels: ") == 1
    assert cause in said


def test_a_wheel_whose_maker_wants_none_is_pure_and_no_compiler_is_asked(tmp_path: Path) -> None:
    wheel, said = _made_without(tmp_path, {"CXX": "false", "FLORA_DIST_KERNELS": "torch"})
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "kernels" not in said


def test_such_a_wheel_steps_with_torch_and_says_once_how_to_compile(tmp_path: Path) -> None:
    wheel, _ = _made_without(tmp_path, {"CXX": "false"})
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    # No library of this user's either, and no choice of theirs.
    where = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {k: v for k, v in os.environ.items() if k != "FLORA_DIST_KERNELS"} | where
    command = [sys.executable, "-W", "error:::flora_dist", "-c", TWO_STEPS]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if REMEDY in line]
    assert line == f"  kernels: torch: none are installed. Compile them once: {REMEDY}"
