# SPDX-License-Identifier: Apache-2.0
"""Builds the documentation as a site; a broken link, anchor or name of the API fails.

    .venv/bin/python launch/_build_site.py FOLDER

Pages are docs/ and every README, at their own paths, so that links between them hold on the site
as they do in the repository.
"""

import logging
import shutil
import sys
import tempfile
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[1]
# What pages link to lies in these; the rest of a clone is large, or not ours.
_FOLDERS = ("configs", "docker", "docs", "flora_dist", "launch", "tests")
_FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE")


def main() -> int:
    """Builds it; 1 where something is broken, which is said."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: _build_site.py FOLDER\n")
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # what is broken, and where
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        for name in _FOLDERS:
            shutil.copytree(ROOT / name, pages / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in _FILES:
            shutil.copy(ROOT / name, pages / name)
        config = load_config(
            str(ROOT / "docs" / "mkdocs.yml"),
            docs_dir=folder,
            site_dir=str(Path(sys.argv[1]).resolve()),
            strict=True,
        )
        try:
            build(config)
        except Abort as error:
            sys.stderr.write(f"{error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
