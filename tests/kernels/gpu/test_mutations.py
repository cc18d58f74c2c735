# SPDX-License-Identifier: Apache-2.0
"""Checks of the Triton kernels notice a fault in each phase."""

from __future__ import annotations

import pytest

from tests.kernels.gpu.mutations import CHECKS, MUTATIONS, ROOT, SOURCES, is_noticed


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_triton_kernels_still_finds_its_place(name: str) -> None:
    mutation = MUTATIONS[name]
    assert (ROOT / SOURCES / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.check in CHECKS


def test_one_broken_phase_is_noticed() -> None:
    assert is_noticed(MUTATIONS["random bits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_phase_is_noticed(name: str) -> None:
    assert is_noticed(MUTATIONS[name])
