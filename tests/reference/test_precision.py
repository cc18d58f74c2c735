# SPDX-License-Identifier: Apache-2.0
"""The oracle in bf16 and fp16."""

import math
import zlib

import pytest
import torch
from torch import Tensor

from flora_dist.reference import Reference, ReferenceSettings, stochastic_round
from tests.reference.runs import (
    assert_equal,
    gradients_of,
    hadamard_bases,
    momentum_of,
    no_sketch,
    start_of,
    trained,
)

# ---------------------------------------------------------------- low precision


def _bits(name: str, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
    key = zlib.crc32(f"{name} {purpose} {step} {shape}".encode())
    return torch.randint(0, 65536, shape, generator=torch.Generator().manual_seed(key))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (4, 2, 2, 2), (9,), ()])
@pytest.mark.parametrize("stochastic", [True, False])
def test_low_precision_weights_stay_within_one_spacing_of_float32(
    dtype: torch.dtype, shape: tuple[int, ...], stochastic: bool
) -> None:
    weight, gradients = start_of(*shape, dtype=dtype), gradients_of(shape, 1, dtype=dtype)
    low = Reference(
        {"w": weight},
        sketch=hadamard_bases(8, 2, dtype=torch.float32),
        settings=ReferenceSettings(lr=0.1, stochastic_rounding=stochastic),
        bits=_bits if stochastic else None,
    )
    low.step({"w": gradients[0]})
    exact = trained(
        weight.float(), [gradients[0].float()], hadamard_bases(8, 2, dtype=torch.float32), lr=0.1
    ).weights["w"]
    got = low.weights["w"]
    assert got.dtype == dtype
    spacing = torch.finfo(dtype).eps * 2 ** exact.abs().log2().floor()
    error = (got.float() - exact).abs()
    assert bool((error <= (1.0 if stochastic else 0.5) * spacing).all())
    # The state is float32, bit for bit that of the float32 weight.
    want = trained(
        weight.float(), [gradients[0].float()], hadamard_bases(8, 2, dtype=torch.float32)
    )
    assert_equal(low.state("w"), want.state("w"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.003, -0.37, 1e-4, 2.5e-7, -3e-6, 1.999, 0.0])
def test_stochastic_rounding_is_unbiased_between_two_neighbours(
    dtype: torch.dtype, value: float
) -> None:
    x = torch.full((65536,), value)
    rounded = stochastic_round(x, dtype, torch.arange(65536)).double()
    info = torch.finfo(dtype)
    exponent = 2.0 ** math.floor(math.log2(abs(value))) if value else 0.0
    spacing = info.eps * max(exponent, info.smallest_normal)
    exact = float(x[0])
    assert float((rounded - exact).abs().max()) < spacing
    # All 65536 values of u, each once: the mean is exact to the resolution of u.
    assert abs(float(rounded.mean()) - exact) <= spacing / 65536


def test_stochastic_rounding_leaves_what_the_dtype_can_hold() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = stochastic_round(every.float(), torch.bfloat16, torch.full((65536,), 65535))
    assert torch.equal(rounded.nan_to_num(nan=7.0), every.nan_to_num(nan=7.0))
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    rounded = stochastic_round(halves.float(), torch.float16, torch.full((65536,), 65535))
    assert torch.equal(rounded.nan_to_num(nan=7.0), halves.nan_to_num(nan=7.0))


def test_zero_bits_round_towards_zero() -> None:
    x = torch.tensor([1.0039, -1.0039, 1e-40, float("inf"), -float("inf")])
    rounded = stochastic_round(x, torch.bfloat16, torch.zeros(5, dtype=torch.int64))
    assert rounded.tolist()[:2] == [1.0, -1.0]
    assert 0 < rounded[2] <= x[2]
    assert rounded.tolist()[3:] == [float("inf"), -float("inf")]


def test_missing_bits_are_an_error() -> None:
    weight = start_of(4, 8, dtype=torch.bfloat16)
    sketch = hadamard_bases(8, 2, dtype=torch.float32)
    reference = Reference({"w": weight}, sketch=sketch, settings=ReferenceSettings())
    with pytest.raises(ValueError, match="bits must be given: 'w' rounds its weight"):
        reference.step({"w": weight})


@pytest.mark.parametrize("rule", ["flora", "flora_strict", "blend"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 8)])
def test_bf16_momentum_is_rounded_after_the_update_used_it(
    rule: str, compressed: bool, shape: tuple[int, ...]
) -> None:
    sketch = hadamard_bases(8, 2, dtype=torch.float32) if compressed else no_sketch
    weight = start_of(*shape, dtype=torch.float32)
    gradients = gradients_of(shape, 2, dtype=torch.float32)
    asked: list[tuple[str, str, int, tuple[int, ...]]] = []

    def bits(name: str, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
        asked.append((name, purpose, step, shape))
        return _bits(name, purpose, step, shape)

    settings = ReferenceSettings(momentum=rule, state_dtype=torch.bfloat16)
    low = Reference({"w": weight}, sketch=sketch, settings=settings, bits=bits)
    exact = trained(weight, gradients[:1], sketch, momentum=rule)
    low.step({"w": gradients[0]})
    # M starts at zero, so the first step's weights and new M know no rounding.
    assert torch.equal(low.weights["w"], exact.weights["w"])
    momentum = momentum_of(exact)
    want = stochastic_round(
        momentum, torch.bfloat16, _bits("w", "momentum", 1, tuple(momentum.shape))
    )
    assert momentum_of(low).dtype == torch.bfloat16
    assert torch.equal(momentum_of(low), want)
    low.step({"w": gradients[1]})
    assert asked == [("w", "momentum", step, tuple(momentum.shape)) for step in (1, 2)]


def test_bf16_momentum_rounds_to_nearest_without_stochastic_rounding() -> None:
    weight, sketch = start_of(4, 8, dtype=torch.float32), hadamard_bases(8, 2, dtype=torch.float32)
    gradients = gradients_of((4, 8), 1, dtype=torch.float32)
    knobs = {"state_dtype": torch.bfloat16, "stochastic_rounding": False}
    low = trained(weight, gradients, sketch, **knobs)
    exact = trained(weight, gradients, sketch)
    assert torch.equal(momentum_of(low), momentum_of(exact).bfloat16())
