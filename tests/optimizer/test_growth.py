# SPDX-License-Identifier: Apache-2.0
"""``growth``: what it does to an update, what it keeps, and where it replaces ``clip``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_dist import Flora, checkpoint
from flora_dist.core.parameters.report import Report
from flora_dist.core.state.presets import RACS
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import geometry_of
from flora_dist.core.step import elements, matrix
from flora_dist.kernels.choice import phases_of
from flora_dist.kernels.gpu.cover import why_not_of
from flora_dist.kernels.library import found
from tests.battery.oracle import Case, distances, reference_of
from tests.optimizer import runs

GROWTH = 1.01
SIZES = (1.0, 1.0, 50.0, 50.0, 0.0, 3.0, 0.1, 9.0)
"""Of the gradients, step by step: jumps, and a step without any."""


def _step(optimizer: Flora, weights: runs.Parameters, step: int) -> None:
    for name, weight in weights.items():
        weight.grad = SIZES[step] * runs.draw(name, step, weight.shape, weight.dtype)
    optimizer.step()


def _pair(**settings: Any) -> tuple[runs.Parameters, Flora]:
    weights = runs.build()
    settings = {**runs.SETTINGS, "clip": None, "growth": GROWTH, "beta2": 0.999, **settings}
    return weights, Flora(weights.items(), **settings)


def test_an_update_grows_by_the_factor_at_most_and_shrinks_freely() -> None:
    weights, optimizer = _pair(momentum="none", lr=1.0)
    free, unbounded = _pair(momentum="none", lr=1.0, growth=None)
    norms: list[Tensor] = []
    grown = 0
    for step in range(len(SIZES)):
        before = weights["wide"].detach().clone()
        was = free["wide"].detach().clone()
        _step(optimizer, weights, step)
        _step(unbounded, free, step)
        norm = (weights["wide"].detach() - before).norm()
        wanted = (free["wide"].detach() - was).norm()
        if norms and norms[-1] > 0:
            grown += bool(wanted > GROWTH * norms[-1])
            wanted = wanted.minimum(GROWTH * norms[-1])
        torch.testing.assert_close(norm, wanted)
        norms.append(norm)
        torch.testing.assert_close(optimizer.state[weights["wide"]]["norm"], norm.view(1))
    assert grown >= 2


@pytest.mark.parametrize("momentum", ["flora", "flora_strict", "blend", "ademamix", "none"])
def test_steps_with_growth_are_the_reference(momentum: str) -> None:
    weights, optimizer = _pair(momentum=momentum)
    start = runs.values(weights)
    settings = {**runs.SETTINGS, "growth": GROWTH, "beta2": 0.999, "momentum": momentum}
    oracle = reference_of(Case(settings={**settings, "clip": None}), start)
    for step in range(len(SIZES)):
        _step(optimizer, weights, step)
        oracle.step({name: weight.grad for name, weight in weights.items()})
    assert distances(start, dict(oracle.weights), runs.values(weights))[1] < 1e-11


def test_a_limit_that_forgets_the_last_norm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(square_sum_H: Tensor, last_H: Tensor, growth: float) -> tuple[Tensor, Tensor]:
        return elements.growth_factor(square_sum_H, torch.zeros_like(last_H), growth)

    monkeypatch.setattr(matrix, "growth_factor", forgetful)
    with pytest.raises(AssertionError):
        test_steps_with_growth_are_the_reference("none")


def test_the_norm_is_kept_by_matrix_and_counted_and_vectors_are_clipped_as_ever() -> None:
    weights, optimizer = _pair(momentum="none")
    report: Report = optimizer.report()
    _step(optimizer, weights, 0)
    shapes = {n: optimizer.state[w].get("norm", torch.empty(0)).shape for n, w in weights.items()}
    assert shapes["wide"] == (1,)
    assert shapes["experts"] == (3, 1)
    assert shapes["bias"] == (0,)
    assert report.state_bytes == runs.state_bytes(optimizer)


@pytest.mark.parametrize("normalise", ["factored", "racs"])
def test_a_checkpoint_keeps_norms_and_what_rows_and_columns_weigh(
    normalise: str, tmp_path: Path
) -> None:
    modules = [runs.Module(), runs.Module()]
    settings = {**runs.SETTINGS, "growth": GROWTH, "normalise": normalise}
    first, second = (Flora(m.named_parameters(), **settings) for m in modules)
    for step in range(3):
        _step(first, dict(modules[0].named_parameters()), step)
    checkpoint.save(tmp_path, modules[0], first, step=3)
    checkpoint.load(tmp_path, modules[1], second)
    for step in range(3, len(SIZES)):
        _step(first, dict(modules[0].named_parameters()), step)
        _step(second, dict(modules[1].named_parameters()), step)
    runs.assert_equal(dict(modules[1].state_dict()), dict(modules[0].state_dict()))


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({"growth": GROWTH}, "NativePhases"),
        ({"normalise": "rows"}, "NativePhases"),
        ({"normalise": "racs"}, "MatrixPhases"),
        ({"orthogonalise": 300}, "MatrixPhases"),
    ],
    ids=str,
)
def test_compiled_kernels_leave_matrices_that_they_cannot_step_to_torch(
    settings: dict[str, Any], phases: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORA_DIST_KERNELS", "native")
    assert found().operators is not None
    kinds: dict[str, set[str]] = {}

    def watched(batch: Any, gradient: Any) -> Any:
        made = phases_of(batch, gradient)
        kind = "vector" if batch.geometry.is_vector else "matrix"
        kinds.setdefault(kind, set()).add(type(made).__name__)
        return made

    weights = runs.build(dtype=torch.float32)
    optimizer = Flora(weights.items(), **settings)
    monkeypatch.setattr(optimizer.roster, "_phases_of", watched, raising=False)
    _step(optimizer, weights, 0)
    assert kinds == {"vector": {"NativeVectorPhases"}, "matrix": {phases}}


@pytest.mark.parametrize(
    ("shape", "reason"), [((64, 64), "normalise='racs'"), ((64,), "")], ids=str
)
def test_kernels_for_gpus_leave_weighed_rows_and_columns_to_torch(
    shape: tuple[int, ...], reason: str
) -> None:
    config = FloraConfig(**RACS)
    size = geometry_of("w", shape, config)
    assert why_not_of(size, config, torch.float32) == reason


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_norm_that_rounding_left_limits_nothing(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORA_DIST_KERNELS", kernels)
    weight = torch.nn.Parameter(torch.ones(16, 64))
    optimizer = Flora([("w", weight)], growth=GROWTH, lr=0.1)
    weight.grad = torch.randn(16, 64)
    optimizer.step()
    optimizer.state[weight]["norm"].fill_(1e-6)
    before = weight.detach().clone()
    optimizer.step()
    moved = (weight.detach() - before).norm()
    assert moved > 1.0


@pytest.mark.parametrize("growth", [0.9, 0, float("nan"), "fast"])
def test_a_growth_that_is_none_is_refused(growth: Any) -> None:
    with pytest.raises(ValueError, match=r"growth must be a number in \[1, inf\)"):
        Flora(runs.build().items(), growth=growth)
