# SPDX-License-Identifier: Apache-2.0
"""What a mutation of the kernels is, and the tests that most of them are seen by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = Path("flora_dist/kernels/cpu")
FIXED = "tests/kernels/test_paths.py::test_a_fixed_run_is_the_same_by_kernels_and_by_torch"
BOUNDED = (
    "tests/kernels/test_paths.py::test_growth_and_normalise_are_the_same_by_kernels_and_by_torch"
)


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of a source, and the test that must fail then."""

    file: str
    old: str
    new: str
    test: str
    select: str = ""
    """``-k`` of pytest."""
