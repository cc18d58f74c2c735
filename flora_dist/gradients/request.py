# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` is asked for: the level, numbers per block, bits kept and bits sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from flora_dist.core.records import FEW_BITS, FULL_BITS, gradient_bits
from flora_dist.core.state.settings import FloraConfig, check_bits, check_rank
from flora_dist.core.state.spec import LEVELS, Geometry, geometry_at
from flora_dist.gradients.average import Ahead

WIRE_DTYPES: Mapping[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""What travels: as accumulated (float64 for float64 parameters), or rounded."""
MIB = 1 << 20
GRADIENT_BITS = (FULL_BITS, 16, *FEW_BITS)
"""Of a gradient's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What travels of sketches."""

    dtype: torch.dtype | None
    """Of numbers; None: as they are accumulated."""
    bits: int | None
    """Of each number in a record; None: numbers travel."""
    bucket_bytes: int | None = None
    """Of a message that is sent during backward; None: all is sent at the step."""

    def ahead(self, order: Sequence[int]) -> Ahead | None:
        """What is sent during backward; ``order``: parameters as their gradients arrive."""
        if self.bucket_bytes is None:
            return None
        return Ahead(order=order, bucket_bytes=self.bucket_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRequest:
    """How gradients are to be kept and sent; as ``attach`` names them."""

    gradients: str
    """The level, of ``LEVELS`` but dense."""
    gradient_rank: int | None = None
    gradient_bits: int | None = None
    wire_bits: int | None = None
    wire_dtype: str = "float32"
    bucket_cap_mb: float | None = None

    def words(self) -> dict[str, object]:
        """Name and value of each, for comparing ranks and for messages."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.words().items())

    @property
    def bits(self) -> int:
        """Of each number that is kept."""
        return gradient_bits(
            self.gradients,
            rank=self.gradient_rank,
            bits=self.gradient_bits,
            wire_bits=self.wire_bits,
            wire_dtype=self.wire_dtype,
        )

    @property
    def wire(self) -> Wire:
        """What travels."""
        if self.bits == FULL_BITS and self.wire_bits in (None, FULL_BITS):
            return Wire(dtype=WIRE_DTYPES[self.wire_dtype], bits=None)
        if self.bits == FULL_BITS and self.wire_bits == 16:
            return Wire(dtype=torch.bfloat16, bits=None)
        return Wire(
            dtype=None,
            bits=self.bits if self.wire_bits is None else self.wire_bits,
            bucket_bytes=None if self.bucket_cap_mb is None else int(self.bucket_cap_mb * MIB),
        )

    def check(self) -> None:
        """Refuse what does not exist or does not go together.

        Raises:
            ValueError: naming what would.
        """
        if self.gradients not in LEVELS[1:]:
            raise ValueError(
                f"gradients must be one of {', '.join(LEVELS[1:])}; got {self.gradients!r}. For "
                "dense gradients do not call attach()."
            )
        if self.wire_dtype not in WIRE_DTYPES:
            raise ValueError(
                f"wire_dtype must be one of {', '.join(WIRE_DTYPES)}; got {self.wire_dtype!r}. "
                "Pass one of these."
            )
        rank = self.gradient_rank
        if rank is not None and (type(rank) is not int or rank < 1):
            raise ValueError(
                f"gradient_rank must be a whole number of at least 1; got {rank!r}. Pass 1 or "
                "more, or leave it out."
            )
        for name in ("gradient_bits", "wire_bits"):
            if getattr(self, name) is not None:
                check_bits(name, getattr(self, name), GRADIENT_BITS)
        self._check_together()
        self._check_cap()

    def _check_cap(self) -> None:
        cap = self.bucket_cap_mb
        if cap is None:
            return
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap < float("inf"):
            raise ValueError(
                f"bucket_cap_mb must be a number of MiB above 0; got {cap!r}. Pass 1, or leave it "
                "out for one message at the step."
            )
        if self.gradients != "compressed" or self.wire.bits is None:
            raise ValueError(
                "bucket_cap_mb sends sketches in few bits during backward, under "
                f'gradients="compressed"; got gradients={self.gradients!r}, gradient_bits='
                f"{self.bits}, wire_bits={self.wire_bits}. Leave it out, or pass wire_bits=4."
            )

    def _check_together(self) -> None:
        few = self.bits != FULL_BITS or self.wire_bits not in (None, FULL_BITS)
        if few and self.wire_dtype != "float32":
            raise ValueError(
                f"wire_dtype={self.wire_dtype!r} is wire_bits=16 in other words; got it beside "
                f"gradient_bits={self.gradient_bits} and wire_bits={self.wire_bits}. Pass "
                "wire_bits alone."
            )
        if self.wire_bits is not None and self.wire_bits > self.bits:
            raise ValueError(
                "wire_bits must not exceed gradient_bits: what is sent is made of what is kept; "
                f"got {self.wire_bits} and {self.bits}. Lower wire_bits, or leave it out."
            )
        if self.gradients == "fused" and few:
            raise ValueError(
                'gradients="fused" keeps its numbers in full: it saves arithmetic by a low rank; '
                f"got gradient_bits={self.gradient_bits}, wire_bits={self.wire_bits}. Leave them "
                'out, or use gradients="compressed".'
            )
        if self.gradients == "sharded" and few:
            raise ValueError(
                'gradients="sharded" keeps its numbers in full, and the framework reduces whole '
                f"gradients; got gradient_bits={self.gradient_bits}, wire_bits={self.wire_bits}. "
                'Leave them out, or use gradients="compressed".'
            )

    def geometry(self, name: str, shape: tuple[int, ...], config: FloraConfig) -> Geometry:
        """Blocks and numbers per block of a parameter's gradient sketches.

        Without ``gradient_rank``: the group's rank, or in few bits all numbers of a block.

        Raises:
            ValueError: a rank that saves nothing, few bits of a sketch that is no rotation.
        """
        if config.compress != "halving":
            raise ValueError(
                f"gradients are sketched along rows alone; got compress={config.compress!r}. Use "
                "compress='halving', with which Algorithm 1 is the authors' own."
            )
        few = self.bits in FEW_BITS
        rank = config.rank if self.gradient_rank is None else self.gradient_rank
        check_rank(rank, config.block, self.bits)
        if few and config.sketch != "hadamard":
            raise ValueError(
                "few bits need sketch='hadamard', a rotation: its levels are of rotated numbers; "
                f"got sketch={config.sketch!r} and {self.bits} bits. Change sketch, or pass "
                "gradient_bits=32."
            )
        is_whole = few and self.gradient_rank is None and rank is not None
        kept: int | Literal["block"] | None = "block" if is_whole else rank
        return geometry_at(name, shape, config, rank=kept, bits=self.bits)
