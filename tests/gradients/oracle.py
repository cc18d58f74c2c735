# SPDX-License-Identifier: Apache-2.0
"""The reference run on sketched gradients: ``reference.py`` fed with expand(compress(mean G))."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flora_dist.core.records import FULL_BITS
from flora_dist.core.sketch.keys import Purpose, derive_key, name_key
from flora_dist.core.sketch.matrices import sketch_matrix
from flora_dist.core.state.settings import KNOBS, FloraConfig
from flora_dist.core.state.spec import geometry_at
from flora_dist.reference import compress, expand
from tests.battery import zoo
from tests.battery.oracle import SAMPLES, STEPS, Case, reference_of, trainable

Weights = dict[str, Tensor]

MANY = 144
"""Samples divisible by 1, 2, 3 and 4 ranks times 1, 3 and 4 micro-batches."""


@dataclass(frozen=True, kw_only=True)
class SketchedCase(Case):
    """One setting of the battery with gradients kept as sketches."""

    level: str = "compressed"
    gradient_rank: int | None = None
    gradient_bits: int | None = 32
    wire_bits: int | None = None
    wire_dtype: str = "float32"
    bucket_cap_mb: float | None = None
    micro_batches: int = 1
    samples: int = SAMPLES
    max_norm: float | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the model's sketches, which are less than a MiB, take several messages."""
        return self.bucket_cap_mb is not None and self.bucket_cap_mb < 1

    def __str__(self) -> str:
        words = [super().__str__(), self.level, f"x{self.micro_batches} of {self.samples}"]
        if self.gradient_rank is not None:
            words.append(f"gradient_rank={self.gradient_rank}")
        if (self.gradient_bits, self.wire_bits) != (32, None):
            words.append(f"bits={self.gradient_bits}-{self.wire_bits}")
        if self.bucket_cap_mb is not None:
            words.append(f"bucket_cap_mb={self.bucket_cap_mb}")
        if self.max_norm is not None:
            words.append(f"max_norm={self.max_norm}")
        return "-".join(words)


class GradientSketch:
    """What the step sees of a mean gradient: C A, with A drawn anew for each step."""

    def __init__(self, case: SketchedCase) -> None:
        self._case = case
        self._config = FloraConfig(**{k: v for k, v in case.flora.items() if k in KNOBS})

    def compressed(self, name: str, gradient: Tensor, step: int) -> tuple[Tensor, ...] | None:
        """C of each matrix; None where the gradient stays dense."""
        matrices = self._matrices(name, tuple(gradient.shape), gradient.dtype, step)
        if matrices is None:
            return None
        batch = self._batch(gradient, len(matrices))
        return tuple(compress(g, a) for g, a in zip(batch, matrices, strict=True))

    def seen(self, name: str, gradient: Tensor, step: int) -> Tensor:
        """The gradient that the step works on."""
        matrices = self._matrices(name, tuple(gradient.shape), gradient.dtype, step)
        if matrices is None:
            return gradient
        batch = self._batch(gradient, len(matrices))
        pairs = zip(batch, matrices, strict=True)
        return torch.stack([expand(compress(g, a), a, g.shape[1]) for g, a in pairs]).view_as(
            gradient
        )

    def _batch(self, gradient: Tensor, matrices: int) -> Tensor:
        rows = gradient.shape[1] if matrices > 1 else gradient.shape[0]
        return gradient.reshape(matrices, rows, -1)

    def _matrices(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, step: int
    ) -> list[Tensor] | None:
        rank = self._case.gradient_rank
        config = self._config if rank is None else replace(self._config, rank=rank)
        size = geometry_at(name, shape, config, rank=config.rank, bits=FULL_BITS)
        if size.rank is None:
            return None
        found = []
        for matrix in range(size.num_matrices):
            key = derive_key(
                seed=config.seed,
                name_key=name_key(name),
                purpose=Purpose.GRADIENT,
                window=step,
                matrix=matrix,
            )
            found.append(
                sketch_matrix(
                    config.sketch,
                    key=key,
                    rank=size.rank,
                    block=size.block,
                    dtype=torch.promote_types(dtype, torch.float32),
                    device="cpu",
                )
            )
        return found


def reference_run(case: SketchedCase, steps: int = STEPS) -> tuple[Weights, Weights, list[float]]:
    """Weights before and after, and each step's norm: of sketches, exact where dense."""
    model = zoo.build(case.dtype)
    start = trainable(model)
    reference, sketch = reference_of(case, start), GradientSketch(case)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norms = []
    for step in range(1, steps + 1):
        model.zero_grad()
        model(zoo.batch(step - 1, case.samples)).backward()
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        norm = norm_of(sketch, gradients, step)
        norms.append(float(norm))
        factor = 1.0
        if case.max_norm is not None:
            factor = float((case.max_norm / (norm + 1e-6)).clamp(max=1.0))
        reference.step({n: factor * sketch.seen(n, g, step) for n, g in gradients.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return start, dict(reference.weights), norms


def norm_of(sketch: GradientSketch, gradients: Weights, step: int) -> Tensor:
    """sqrt(sum |C|^2), with the exact norm of what is dense."""
    squares = []
    for name, gradient in gradients.items():
        compressed = sketch.compressed(name, gradient, step)
        parts = (gradient,) if compressed is None else compressed
        squares += [part.square().sum() for part in parts]
    return torch.stack(squares).sum().sqrt()
