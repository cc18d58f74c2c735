# SPDX-License-Identifier: Apache-2.0
"""Short runs of the oracle, and how they are compared."""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from flora_dist.reference import Reference, ReferenceSettings

RULES = ("flora", "flora_strict", "blend", "none")
F64 = torch.float64
Sketch = Callable[[str, int, int], Tensor | None]


def gradients_of(shape: tuple[int, ...], steps: int, *, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(shape, generator=generator, dtype=F64) * 3 + 0.1
    draws = [torch.randn(shape, generator=generator, dtype=F64) * scale for _ in range(steps)]
    return [g.to(dtype) for g in draws]


def hadamard_bases(block: int, rank: int, *, dtype: torch.dtype = F64) -> Sketch:
    """Return rows of a Hadamard matrix with random signs: A A^T = (B/R) I."""
    h = torch.ones(1, 1, dtype=F64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])

    def sketch(name: str, matrix: int, window: int) -> Tensor:
        key = zlib.crc32(f"{name} {matrix} {window}".encode())
        generator = torch.Generator().manual_seed(key)
        rows = torch.randperm(block, generator=generator)[:rank]
        signs = torch.randint(0, 2, (block,), generator=generator) * 2.0 - 1
        return (h[rows] * signs / math.sqrt(rank)).to(dtype)

    return sketch


def no_sketch(_name: str, _matrix: int, _window: int) -> None:
    return None


def start_of(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def trained(weight: Tensor, gradients: list[Tensor], bases: Sketch, **knobs: object) -> Reference:
    settings = ReferenceSettings(**knobs)
    reference = Reference({"w": weight}, sketch=bases, settings=settings)
    for gradient in gradients:
        reference.step({"w": gradient})
    return reference


def momentum_of(reference: Reference, name: str = "w") -> Tensor:
    momentum = reference.state(name)["momentum"]
    assert isinstance(momentum, Tensor)
    return momentum


def assert_close(actual: object, expected: object) -> None:
    # float64 against float64 in another order of operations: a few roundings of 1e-16 per step.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def assert_equal(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
