# SPDX-License-Identifier: Apache-2.0
"""What pip, an importer without torch and a type checker get from this package."""

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flora_dist

if sys.version_info >= (3, 11):
    import tomllib
else:
    # pytest depends on it below 3.11.
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PLANNER_CONTRACT = "the planner, what it reads, and the launcher run without torch"


def python(*arguments: str, cwd: Path) -> str:
    """Runs a fresh interpreter away from the repository and returns what it printed."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_without_torch() -> list[str]:
    """Returns the modules that import-linter forbids to reach torch; one list for both checks."""
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    [contract] = [one for one in contracts if one["name"] == PLANNER_CONTRACT]
    return ["flora_dist", *contract["source_modules"]]


def requirements(lines: list[str]) -> list[Requirement]:
    """Parses requirement lines, the package's own name (`flora-dist[train]`) left out."""
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if canonicalize_name(one.name) != PROJECT["name"]]


def pins() -> dict[str, Requirement]:
    """Returns launch/constraints.txt by canonical name."""
    text = (ROOT / "launch" / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    parsed = [Requirement(line) for line in lines]
    by_name = {canonicalize_name(one.name): one for one in parsed}
    assert len(by_name) == len(parsed), "a package is pinned twice"
    return by_name


def pinned_version(pin: Requirement) -> str:
    [specifier] = pin.specifier
    assert specifier.operator == "==", pin
    assert "*" not in specifier.version, pin
    return specifier.version


def test_the_versions_of_pyproject_the_package_and_its_metadata_agree() -> None:
    assert flora_dist.__version__ == PROJECT["version"]
    assert importlib.metadata.version("flora-dist") == PROJECT["version"]


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in citation


def test_the_changelog_has_a_section_for_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PROJECT['version']}]" in changelog


def test_importing_the_package_loads_no_torch_and_only_the_package_itself(tmp_path: Path) -> None:
    code = "import flora_dist, sys; print(*sys.modules)"
    loaded = set(python("-c", code, cwd=tmp_path).split())
    assert "flora_dist" in loaded
    assert "torch" not in loaded
    # Lazy names: each module loaded here costs every program that only asks for the version.
    assert {name for name in loaded if name.startswith("flora_dist.")} == set()


@pytest.mark.parametrize("module", modules_without_torch())
def test_what_the_planner_reads_imports_where_torch_is_missing(module: str, tmp_path: Path) -> None:
    block = "import sys; sys.modules.update(torch=None, numpy=None, triton=None, deepspeed=None)"
    python("-c", f"{block}; import {module}", cwd=tmp_path)


def test_blocking_torch_as_these_tests_do_makes_an_import_of_it_fail(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None)\n"
        "try:\n    import torch\nexcept ImportError:\n    print('blocked')"
    )
    assert python("-c", code, cwd=tmp_path) == "blocked\n"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"flora_dist.*'Adam'"):
        getattr(flora_dist, "Adam")  # noqa: B009  (a type checker would refuse the attribute)


def test_every_public_name_can_be_loaded_and_is_listed_by_dir() -> None:
    for name in flora_dist.__all__:
        assert getattr(flora_dist, name) is not None
    assert set(flora_dist.__all__) <= set(dir(flora_dist))


def test_the_console_script_prints_its_help(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "flora-dist"
    command = [str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_the_package_carries_the_marker_for_type_checkers() -> None:
    assert (Path(flora_dist.__file__).parent / "py.typed").read_bytes() == b""


def test_every_package_folder_has_an_init_file() -> None:
    package = Path(flora_dist.__file__).parent
    folders = {file.parent for file in package.rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_every_extra_that_a_message_or_a_docstring_names_exists() -> None:
    named = set()
    for file in (ROOT / "flora_dist").rglob("*.py"):
        for extras in re.findall(r"flora[-_]dist\[([\w,]+)\]", file.read_text(encoding="utf-8")):
            named.update(extras.split(","))
    assert "train" in named, "the trainer must say which extra it needs"
    assert named <= set(EXTRAS)


def test_every_direct_dependency_is_pinned_to_a_version_that_pyproject_allows() -> None:
    pinned = pins()
    direct = requirements([*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["dev"]])
    assert {one.name for one in direct if canonicalize_name(one.name) not in pinned} == set()
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    for requirement in requirements(lines):
        pin = pinned.get(canonicalize_name(requirement.name))
        if pin is not None:
            assert requirement.specifier.contains(pinned_version(pin)), f"{requirement} / {pin}"


def test_every_pin_is_one_exact_version_without_a_local_tag() -> None:
    for pin in pins().values():
        assert "+" not in pinned_version(pin), f"{pin} excludes other builds of the same version"


def test_every_python_file_names_its_licence() -> None:
    files = [
        file for top in ("flora_dist", "tests", "launch") for file in (ROOT / top).rglob("*.py")
    ]
    first_lines = {file: file.read_text(encoding="utf-8").partition("\n")[0] for file in files}
    licence = f"# SPDX-License-Identifier: {PROJECT['license']}"
    # An empty __init__.py holds nothing to license.
    wrong = {file for file, line in first_lines.items() if line != licence and file.stat().st_size}
    assert wrong == set()
