# SPDX-License-Identifier: Apache-2.0
"""What the user sets for the model's products must not reach the optimizer's.

Incident: a step under ``torch.autocast`` took its column sums in bf16, 3e-3 off, silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from flora_dist import Flora
from flora_dist.core.sketch.ops import exact_products
from tests.optimizer import runs


@contextmanager
def _tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _weights_after(around: AbstractContextManager[None]) -> dict[str, Tensor]:
    parameters = runs.build(dtype=torch.float32)
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    with around:
        for step in range(4):
            runs.set_gradients(parameters, step)
            optimizer.step()
    return runs.values(parameters)


@pytest.mark.parametrize("name", ["autocast", "tf32"])
def test_autocast_and_reduced_precision_leave_the_step_bitwise_alone(name: str) -> None:
    around = torch.autocast("cpu", dtype=torch.bfloat16) if name == "autocast" else _tf32()
    expected, got = _weights_after(nullcontext()), _weights_after(around)
    for name, weight in expected.items():
        assert torch.equal(weight, got[name]), name


def test_products_are_exact_inside_and_as_before_outside() -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        with exact_products({"cpu"}):
            assert (a @ b).dtype == torch.float32
        assert (a @ b).dtype == torch.bfloat16
    with _tf32():
        with exact_products({"cpu"}):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"


def test_settings_are_restored_when_the_step_fails() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), exact_products({"cpu"}):
        raise RuntimeError("inside")
    assert torch.backends.cuda.matmul.fp32_precision == before
