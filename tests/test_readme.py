# SPDX-License-Identifier: Apache-2.0
"""The READMEs hold what they say: links and paths lead somewhere, public names are explained."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flora_dist

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted((ROOT / "flora_dist").rglob("README.md"))]
READMES += [ROOT / folder / "README.md" for folder in ("launch", "launch/k8s", "tests", "docker")]
READMES += [ROOT / "configs" / "README.md", ROOT / "configs" / "deepspeed" / "README.md"]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
READMES += [ROOT / "CONTRIBUTING.md", *DOCS]
# Folders of the repository; `runs/` and the like are outputs and need not exist.
TOP = ("flora_dist", "launch", "configs", "tests", "docker", "docs", ".ci")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fenced(text: str, language: str) -> list[str]:
    """Returns the fenced code blocks of one language."""
    return [code for found, code in FENCE.findall(text) if found == language]


def links(text: str) -> Iterator[str]:
    """Yields the targets of links and images that stay inside the repository."""
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", FENCE.sub("", text)):
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]


def paths(text: str) -> Iterator[str]:
    """Yields the words in backticks and in shell blocks that look like paths of the repository."""
    code = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    code += fenced(text, "bash") + fenced(text, "sh") + fenced(text, "console")
    for word in " ".join(code).split():
        path = word.partition("::")[0].removeprefix("./").rstrip(",.;:)")
        if path.partition("/")[0] in TOP and "/" in path and not re.search(r"[<>{}$=]", path):
            yield path


def exists(path: str, home: Path) -> bool:
    """Whether a path or a glob pattern leads somewhere from the repository or from `home`."""
    return any(next(base.glob(path.rstrip("/")), None) for base in (ROOT, home))


def label(readme: Path) -> str:
    return str(readme.relative_to(ROOT))


@pytest.mark.parametrize("readme", READMES, ids=label)
def test_every_relative_link_leads_to_a_file(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    missing = [target for target in links(text) if not (readme.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("readme", READMES, ids=label)
def test_every_path_in_code_exists(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert [path for path in paths(text) if not exists(path, readme.parent)] == []


def test_paths_and_links_are_found_where_they_stand() -> None:
    sample = (
        "See [a](docs/a.md#part), [web](https://example.org), [here](#here),\n"
        "`configs/no.yaml`, `runs/x/log.txt`, `tests/test_no.py::test_x`.\n"
        "```bash\n./launch/no.sh --config configs/*.none\n```\n"
    )
    assert list(links(sample)) == ["docs/a.md"]
    found = ["configs/no.yaml", "tests/test_no.py", "launch/no.sh", "configs/*.none"]
    assert list(paths(sample)) == found
    assert [path for path in found if exists(path, ROOT)] == []


# flora_dist's own is the explanation of the whole, not a folder's label.
LABELS = [
    readme.parent
    for readme in READMES
    if readme.name == "README.md" and readme.parent not in {ROOT, ROOT / "flora_dist"}
]


@pytest.mark.parametrize("folder", LABELS, ids=label)
def test_a_folder_readme_has_at_most_sixty_lines(folder: Path) -> None:
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60


def is_prose(line: str) -> bool:
    """Whether a line outside of fences is no table, no code and more than one link or picture."""
    is_link = re.fullmatch(r"\s*(?:[*-] )?!?\[[^\]]*\]\([^)]*\)[.,;:]?", line)
    return not line.startswith(("|", "    ")) and is_link is None


PROSE = [
    *sorted(ROOT.glob("*.md")),
    *(d for top in TOP for d in sorted((ROOT / top).rglob("*.md"))),
]


@pytest.mark.parametrize("readme", PROSE, ids=label)
def test_prose_stays_within_a_hundred_columns(readme: Path) -> None:
    lines = FENCE.sub("", readme.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if is_prose(line) and len(line) > 100] == []


def test_the_readme_has_at_most_seven_hundred_words_beside_its_code() -> None:
    assert len(FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8")).split()) <= 700


def test_tables_code_and_lone_links_may_be_wider_than_prose() -> None:
    wide = "word " * 30
    assert is_prose(wide)
    assert is_prose(f"* {wide}")
    assert is_prose(f"See [here](a.md): {wide}")
    assert not any(map(is_prose, (f"| {wide} |", f"    {wide}", f"[{wide}](a.md)", "- [a](b.md).")))


@pytest.mark.parametrize("name", [name for name in flora_dist.__all__ if name != "__version__"])
def test_every_public_name_has_a_docstring_and_a_place_in_the_package_readme(name: str) -> None:
    public = getattr(flora_dist, name)
    # Not inspect.getdoc: it would find the docstring of a base class.
    assert vars(public).get("__doc__") if isinstance(public, type) else public.__doc__
    text = (ROOT / "flora_dist" / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{re.escape(name)}\b", text)
