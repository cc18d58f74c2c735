# SPDX-License-Identifier: Apache-2.0
"""The few files that a launcher reads, for as long as it runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def kept(folder: Path, texts: Mapping[str, str]) -> Iterator[None]:
    """While entered, ``folder`` exists with these texts by name; nothing at all for none.

    Its name is the job's, which nobody can guess, and it must be new: a link planted in a shared
    temporary folder is not followed.
    """
    if not texts:
        yield
        return
    folder.mkdir(mode=0o700)
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
