# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/hosts run as they stand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.hosts.small import host_of

PAGES = Path(__file__).parents[2] / "docs" / "hosts"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_example(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = FENCE.findall((PAGES / f"{page}.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(folder)
    with host_of("plain"):
        exec(compile(example, f"{page}.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", ["transformers", "accelerate"])
def test_the_example_of_a_host_in_the_dev_extra_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_example(page, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["lightning", "torchtitan"])
def test_the_example_of_another_host_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(page) is None:
        pytest.skip(f"{page} is not installed (docs/hosts/README.md)")
    run_example(page, tmp_path, monkeypatch)


def test_every_page_is_in_the_index() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES.glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))
