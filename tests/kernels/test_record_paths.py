# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels step on gradients in few bits as torch's operators do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flora_dist.kernels.native import NativePhases
from tests.kernels.paths import Case
from tests.kernels.record_paths import case_of, difference, run

FIXED = Case(
    seed=0,
    shapes=((70, 100), (24, 64), (24, 64), (3, 20, 32), (50,)),
    dtype=torch.float32,
    settings={
        "lr": 1e-2,
        "momentum": "blend",
        "block": 16,
        "rank": 4,
        "gradient_bits": 4,
        "gradient_rank": None,
        "max_norm": 0.5,
    },
)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:.*rounded to")
def test_random_steps_on_records_are_the_same_by_kernels_and_by_torch(seed: int) -> None:
    assert not difference(case_of(seed))


@pytest.mark.parametrize("momentum", ["blend", "flora", "flora_strict"])
def test_a_fixed_step_on_records_is_the_same_by_kernels_and_by_torch(momentum: str) -> None:
    settings = FIXED.settings | {"momentum": momentum, "state_bits": 4, "kappa": 2}
    assert not difference(replace(FIXED, settings=settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_momentum_in_few_bits_is_the_same_by_kernels_and_by_torch(
    bits: int, dtype: torch.dtype
) -> None:
    """Of whole rows and a dense gradient: more blocks than are rounded together."""
    settings = {"lr": 1e-2, "block": 64, "rank": 16, "state_bits": bits}
    shapes = ((70, 144), (24, 64), (24, 64), (3, 20, 192), (50,))
    assert not difference(Case(seed=0, shapes=shapes, dtype=dtype, settings=settings))


def test_the_kernels_do_step_on_records(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = NativePhases.__init__

    def counted(self: NativePhases, *given: object) -> None:
        calls.append(self)
        right(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(NativePhases, "__init__", counted)
    run(FIXED, "native")
    assert len(calls) >= 3
