# SPDX-License-Identifier: Apache-2.0
"""The reference run of the zoo: one process, whole batch, ``reference.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.sketch.keys import Purpose, derive_key, name_key
from flora_dist.core.sketch.matrices import sketch_matrix
from flora_dist.core.sketch.philox import grid16
from flora_dist.core.state.settings import KNOBS, FloraConfig
from flora_dist.core.state.spec import geometry_of, matrix_sizes
from flora_dist.reference import Reference, ReferenceSettings
from tests.battery import zoo

STEPS = 10
SAMPLES = 12  # divisible by 1, 2, 3 and 4 ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of the battery."""

    dtype: torch.dtype = torch.float64
    settings: dict[str, Any] = field(default_factory=dict)
    """Over lr 1e-3, rank 2 of block 8, kappa 3 (windows change), clip 0.3 (active) and momentum in
    float32. "roles" are patterns of names, with what sketches do not follow from."""

    @property
    def flora(self) -> dict[str, Any]:
        base = {"lr": 1e-3, "rank": 2, "block": 8, "kappa": 3, "clip": 0.3}
        return {**base, "state_dtype": "float32", **self.settings}

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch.")]
        return "-".join(words + [f"{k}={v}" for k, v in self.settings.items()])


Shapes = dict[str, tuple[int, ...]]
Sketch = Callable[[str, int, int], Tensor | None]


def sketches(config: FloraConfig, shapes: Shapes, dtype: torch.dtype) -> Sketch:
    """Our matrices, handed to the reference, which knows nothing of keys."""

    def sketch(name: str, matrix: int, window: int) -> Tensor | None:
        size = geometry_of(name, shapes[name], config)
        if size.rank is None:
            return None
        key = derive_key(
            seed=config.seed,
            name_key=name_key(name),
            purpose=Purpose.MOMENTUM,
            window=window,
            matrix=matrix,
        )
        return sketch_matrix(
            config.sketch, key=key, rank=size.rank, block=size.block, dtype=dtype, device="cpu"
        )

    return sketch


def random_bits(
    config: FloraConfig, shapes: Shapes
) -> Callable[[str, str, int, tuple[int, ...]], Tensor]:
    """Our rounding bits: one grid per parameter, the rows of all its matrices numbered through."""
    purposes = {"weight": Purpose.ROUND_WEIGHT, "momentum": Purpose.ROUND_MOMENTUM}

    def bits(name: str, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
        matrices, num_rows, _ = matrix_sizes(shapes[name])
        rows = matrices * num_rows
        columns = torch.Size(shape).numel() // rows
        key = derive_key(
            seed=config.seed,
            name_key=name_key(name),
            purpose=purposes[purpose],
            window=step,
        )
        grid = {"rows": (0, rows), "columns": (0, columns), "num_columns": columns}
        return grid16(key, **grid, device="cpu").view(shape)

    return bits


def reference_of(case: Case, weights: dict[str, Tensor]) -> Reference:
    """The oracle for these weights under a case's settings."""
    knobs = {k: v for k, v in case.flora.items() if k in KNOBS}
    config = FloraConfig(**knobs)
    known = {"state_dtype", "state_bits"}
    shared = set(ReferenceSettings.__dataclass_fields__) & set(case.flora) - known
    low = torch.bfloat16 if config.sketch_bits == 16 else None
    few = config.sketch_bits if config.sketch_bits < 16 else None
    options = {k: case.flora[k] for k in shared} | {"state_dtype": low, "state_bits": few}
    roles = case.settings.get("roles", {})
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    wide = torch.promote_types(case.dtype, torch.float32)
    return Reference(
        weights,
        sketch=sketches(config, shapes, wide),
        settings=lambda name: ReferenceSettings(**{**options, **_of(roles, name)}),
        bits=random_bits(config, shapes),
    )


def _of(roles: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return next((own for pattern, own in roles.items() if fnmatchcase(name, pattern)), {})


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of the parameters that train, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def reference_run(case: Case, steps: int = STEPS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after ``steps`` steps of the whole batch in one process."""
    model = zoo.build(case.dtype)
    start = trainable(model)
    reference = reference_of(case, start)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(steps):
        model.zero_grad()
        model(zoo.batch(step, SAMPLES)).backward()
        reference.step({name: p.grad for name, p in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return start, dict(reference.weights)


def distances(
    start: dict[str, Tensor], expected: dict[str, Tensor], got: dict[str, Tensor]
) -> tuple[float, float]:
    """(whole model, worst parameter): distance to ``expected`` over its movement from ``start``."""
    assert set(got) == set(expected), set(got) ^ set(expected)
    errors = {n: (got[n].double() - expected[n].double()).norm() for n in expected}
    moves = {n: (expected[n].double() - start[n].double()).norm() for n in expected}
    whole = torch.stack(list(errors.values())).norm() / torch.stack(list(moves.values())).norm()
    return float(whole), max(float(errors[n] / moves[n]) for n in expected)
