# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/hosts run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flora_dist import Flora
from tests.hosts.small import host_of
from tests.hosts.trainer_runs import SKETCHES, by_hand

PAGES = Path(__file__).parents[2] / "docs" / "hosts"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def example_of(page: str) -> str:
    (example,) = FENCE.findall((PAGES / f"{page}.md").read_text(encoding="utf-8"))
    return str(example)


@pytest.mark.parametrize("page", ["transformers", "accelerate", "lightning", "torchtitan"])
def test_the_example_of_a_host_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with host_of("plain"):
        exec(compile(example_of(page), f"{page}.md", "exec"), {"__name__": "__main__"})


def run_by_ray(folder: Path, *command: str) -> None:
    """In a process of its own: Ray's start and end are none of the other tests' business."""
    pytest.importorskip("ray.train", reason="ray is not installed (docs/hosts/ray.md)")
    places = [str(PAGES.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], env=environment, cwd=folder, check=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_example_of_ray_runs_on_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example_of("ray"), encoding="utf-8")
    run_by_ray(tmp_path, str(script))


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.timeout(480)  # DeepSpeed may compile its helper first
@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_of_ray_train_the_plain_loop_on_every_layout(workers: str, tmp_path: Path) -> None:
    run_by_ray(tmp_path, "-m", "tests.hosts.ray_runs", workers, "losses.json")
    found = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    sketched = by_hand(kept=set(), sketches=SKETCHES).losses
    dense = by_hand(kept=set()).losses
    assert len(found) == (2 if workers == "1" else 6)
    for way, losses in found.items():
        expected = sketched if way == "prepared, sketched" else dense
        assert losses == pytest.approx(expected, rel=1e-6), way


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_loop_that_ray_starts_again_has_the_bits_of_one_that_did_not_fail(tmp_path: Path) -> None:
    run_by_ray(tmp_path, "-m", "tests.hosts.ray_runs", "retried", "equal.json")
    assert (tmp_path / "equal.json").read_text(encoding="utf-8") == "true"


def test_every_page_is_in_the_index() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES.glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_the_bytes_of_the_experts_are_those_of_the_report() -> None:
    shapes = {"up": (8, 2048, 2048), "down": (8, 2048, 1024), "router": (8, 2048), "norm": (2048,)}
    named = [(name, torch.nn.Parameter(torch.empty(shape))) for name, shape in shapes.items()]
    page = (PAGES / "rl_and_moe.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| Flora, (?:default.*?|`(.*?)`) \| ([\d,]+) \|", page, re.MULTILINE)
    assert len(rows) == 5
    for given, said in rows:
        report = Flora(named, **eval(f"dict({given})")).report()
        assert report.state_bytes == int(said.replace(",", "")), given
    assert f"| AdamW | {report.adamw_bytes:,} |" in page
