# SPDX-License-Identifier: Apache-2.0
"""Norms of gradients, dense and sketched, and clipping to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flora_dist import Flora
from tests.conftest import pool_of
from tests.gradients import small
from tests.gradients.small import Small, attached, inputs, my_inputs


def norms(host: str, max_norm: float) -> tuple[float, float, float]:
    """Ours, torch's, and how far the clipped gradients are apart; gradients are dense."""
    wrapped, model = small.HOSTS[host]()
    optimizer = Flora(wrapped.named_parameters(), **small.SETTINGS)
    wrapped(my_inputs(0)).backward()
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    ours = optimizer.grad_norm()
    assert torch.equal(optimizer.clip_grad_norm_(max_norm), ours)
    clipped = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        parameter.grad = kept[name]
    theirs: Any = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    theirs = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs
    worst = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error: Any = (clipped[name] - parameter.grad).abs().max()
        worst = max(worst, float(error.full_tensor() if isinstance(error, DTensor) else error))
    return float(ours), float(theirs), worst


@pytest.mark.ranks(2)
@pytest.mark.parametrize("max_norm", [0.01, 100.0])
@pytest.mark.parametrize("host", small.HOSTS)
def test_the_norm_of_dense_gradients_is_that_of_torch(host: str, max_norm: float) -> None:
    for ours, theirs, worst in pool_of(2)(norms, host, max_norm):
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert worst < 1e-6 * ours


def test_the_square_of_the_norm_is_unbiased() -> None:
    # Var |c|^2 / |g|^4 = 2 / R at most for one block; 200 steps of 3 matrices of 3 blocks and
    # more leave less than 1 % of standard error.
    model = Small()
    optimizer, _ = attached(model, settings={"lr": 0.0})
    dense = Small()
    dense(inputs(0)).backward()
    exact = torch.stack([p.grad.norm() for p in dense.parameters() if p.grad is not None]).norm()
    squares = []
    for _ in range(200):
        optimizer.zero_grad()
        model(inputs(0)).backward()
        squares.append(float(optimizer.grad_norm()) ** 2)
        optimizer.step()
    mean = sum(squares) / len(squares)
    assert mean == pytest.approx(float(exact) ** 2, rel=0.04)
    assert max(squares) != min(squares)


def test_a_norm_to_clip_to_must_be_positive() -> None:
    optimizer = Flora(Small().named_parameters())
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        optimizer.clip_grad_norm_(0.0)
