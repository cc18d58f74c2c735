# SPDX-License-Identifier: Apache-2.0
"""Prints what became of each file of tests, from the JUnit reports of pytest, as rows of Markdown.

python launch/_by_file.py REPORT.xml...
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

# Pytest's own element for each outcome; a test that has none of them has passed.
_OUTCOMES = {"failure": "failed", "error": "failed in set-up", "skipped": "skipped"}


def rows(reports: Iterable[Path]) -> Iterator[str]:
    """One row a file, in order of names; in bold what must be looked at."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for report in reports:
        # Written by the pytest that has just ended.
        for case in ElementTree.parse(report).iter("testcase"):
            counts[case.get("file") or "(collection)"][_outcome(case)] += 1
    for file, found in sorted(counts.items()):
        parts = [f"{found[one]} {one}" for one in ("passed", "skipped") if found[one]]
        parts += [f"**{found[one]} {one}**" for one in ("failed", "failed in set-up") if found[one]]
        yield f"| `{file}` | {', '.join(parts)} |"


def _outcome(case: ElementTree.Element) -> str:
    return next((name for tag, name in _OUTCOMES.items() if case.find(tag) is not None), "passed")


if __name__ == "__main__":
    sys.stdout.writelines(f"{row}\n" for row in rows(map(Path, sys.argv[1:])))
