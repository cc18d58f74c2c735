# SPDX-License-Identifier: Apache-2.0
"""The reference run on gradients kept and sent in few bits: every rank's own sums, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_dist.core.sketch.keys import Purpose, derive_key, name_key
from flora_dist.core.sketch.matrices import sketch_matrix
from flora_dist.core.sketch.philox import grid16
from flora_dist.core.sketch.quantise import _LEVELS
from flora_dist.core.state.settings import KNOBS, FloraConfig
from flora_dist.core.state.spec import Geometry
from flora_dist.gradients.request import SketchRequest
from flora_dist.reference import compress, expand, few_bits
from tests.battery import zoo
from tests.battery.oracle import STEPS, reference_of, trainable
from tests.gradients.oracle import SketchedCase, Weights


def nearest_levels(x: Tensor, levels: Tensor) -> Tensor:
    """Return s q of each row x (..., R): q the level nearest to x / RMS(x), <s q, x> = |x|^2."""
    tiny = torch.finfo(x.dtype).tiny  # for blocks of zeros, which stay
    unit = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=tiny)
    q = levels[(unit.unsqueeze(-1) - levels).abs().argmin(-1)]
    # s = |x|^2 / <x, q>, to bf16
    scale = x.square().sum(-1, keepdim=True) / (x * q).sum(-1, keepdim=True).clamp(min=tiny)
    return scale.to(torch.bfloat16).to(x.dtype) * q


class FewBits:
    """What a step sees, from each rank's gradients of each micro-batch."""

    def __init__(self, case: SketchedCase) -> None:
        self._config = FloraConfig(**{k: v for k, v in case.flora.items() if k in KNOBS})
        self._request = SketchRequest(
            gradients=case.level,
            gradient_rank=case.gradient_rank,
            gradient_bits=case.gradient_bits,
            wire_bits=case.wire_bits,
        )
        self._kept = case.gradient_bits or 32
        self._sent = case.wire_bits or self._kept

    def seen(self, name: str, gradients: list[list[Tensor]], step: int) -> Tensor:
        """``gradients``: by rank and micro-batch."""
        like = gradients[0][0]
        size = self._request.geometry(name, tuple(like.shape), self._config)
        if size.rank is None:
            return torch.stack([sum(own, torch.zeros_like(like)) for own in gradients]).mean(0)
        a = self._matrices(name, size, step)
        sums = [self._sum(name, size, a, own, step, r) for r, own in enumerate(gradients)]
        mean = torch.stack(sums).sum(0) / len(sums)
        if len(sums) > 1:
            mean = few_bits(
                mean, max(self._sent, 4), self._bits(name, Purpose.ROUND_MEAN, step, mean)
            )
        rows = [expand(c, own, size.num_columns) for c, own in zip(mean, a, strict=True)]
        return torch.stack(rows).view_as(like)

    def _sum(
        self, name: str, size: Geometry, a: Tensor, own: list[Tensor], step: int, rank: int
    ) -> Tensor:
        """C <- Q(C + G A^T) of one rank, (E, N, K, R), and what of it is sent."""
        total: Tensor | None = None
        for number, gradient in enumerate(own):
            batch = gradient.reshape(size.num_matrices, size.num_rows, -1)
            c = torch.stack([compress(g, each) for g, each in zip(batch, a, strict=True)])
            if self._kept == 32:
                total = c if total is None else total + c
                continue
            if total is None and self._kept in _LEVELS:
                total = self._levels(c, self._kept)
                continue
            total = c if total is None else total + c
            draw = (number << 20) + rank
            u = self._bits(name, Purpose.ROUND_GRADIENT, step, total, draw)
            total = few_bits(total, self._kept, u)
        assert total is not None
        return total if self._sent == self._kept else self._levels(total, self._sent)

    def _levels(self, c: Tensor, bits: int) -> Tensor:
        half = torch.tensor(_LEVELS[bits], dtype=c.dtype)
        return nearest_levels(c, torch.cat([-half.flip(0), half]))

    def _key(self, name: str, purpose: Purpose, step: int, number: int) -> int:
        return derive_key(
            seed=self._config.seed,
            name_key=name_key(name),
            purpose=purpose,
            window=step,
            matrix=number,
        )

    def _bits(self, name: str, purpose: Purpose, step: int, c: Tensor, draw: int = 0) -> Tensor:
        lines, numbers = c.shape[0] * c.shape[1], c.shape[2] * c.shape[3]
        grid = {"rows": (0, lines), "columns": (0, numbers), "num_columns": numbers}
        return grid16(self._key(name, purpose, step, draw), **grid, device="cpu").view(c.shape)

    def _matrices(self, name: str, size: Geometry, step: int) -> Tensor:
        assert size.rank is not None
        return torch.stack(
            [
                sketch_matrix(
                    self._config.sketch,
                    key=self._key(name, Purpose.GRADIENT, step, matrix),
                    rank=size.rank,
                    block=size.block,
                    dtype=torch.float64,
                    device="cpu",
                )
                for matrix in range(size.num_matrices)
            ]
        )


def reference_run(case: SketchedCase, ranks: int) -> tuple[Weights, Weights]:
    """Weights before and after: each rank's gradients of its share, micro-batch by micro-batch."""
    model = zoo.build(case.dtype)
    start = trainable(model)
    reference, sketch = reference_of(case, start), FewBits(case)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(1, STEPS + 1):
        everything = []
        for rank in range(ranks):
            tokens = zoo.share(zoo.batch(step - 1, case.samples), rank, ranks)
            parts = tokens.chunk(case.micro_batches)
            everything.append([_gradients(model, part, case) for part in parts])
        names = {name for own in everything for found in own for name in found}
        found = {
            name: [[g[name] for g in own if name in g] for own in everything] for name in names
        }
        reference.step(
            {name: sketch.seen(name, found[name], step) for name in parameters if name in names}
        )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return start, dict(reference.weights)


def _gradients(model: zoo.Zoo, tokens: Tensor, case: SketchedCase) -> dict[str, Tensor]:
    model.zero_grad()
    (model(tokens) / case.micro_batches).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
