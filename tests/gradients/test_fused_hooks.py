# SPDX-License-Identifier: Apache-2.0
"""Hooks on the weights of fused layers: who waits for a gradient gets one, or an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_dist.gradients.placeholder import stands_in
from tests.gradients.small import attached, formed
from tests.gradients.test_fused_weights import EQUAL, Stack, X, sums_of


def dense_gradient() -> Tensor:
    model = Stack().double()
    model(X).backward()
    assert model.a.weight.grad is not None
    return model.a.weight.grad


def test_a_hook_that_is_added_later_gets_the_gradient_and_changes_it() -> None:
    seen: list[Tensor] = []

    def double(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return 2 * gradient

    sketches = {}
    for level in ("compressed", "fused"):
        model = Stack().double()
        _, handle = attached(model, level)
        model.a.weight.register_hook(double)
        model(X).backward()
        sketches[level] = sums_of(handle)["sketches of a.weight"]
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], dense_gradient(), rtol=EQUAL, atol=EQUAL)
    torch.testing.assert_close(sketches["fused"], sketches["compressed"], rtol=EQUAL, atol=EQUAL)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_hook_after_accumulation_finds_what_it_does_under_compressed(is_late: bool) -> None:
    found: dict[str, Any] = {}
    for level in ("compressed", "fused"):
        model = Stack().double()

        def look(parameter: Tensor, level: str = level) -> None:
            found[level] = copy.copy(parameter.grad) if not is_late else stands_in(parameter.grad)

        if not is_late:
            model.a.weight.register_post_accumulate_grad_hook(look)
        _optimizer, _ = attached(model, level)
        if is_late:
            model.a.weight.register_post_accumulate_grad_hook(look)
        model(X).backward()
    if is_late:
        assert found == {"compressed": True, "fused": True}
    else:
        torch.testing.assert_close(found["fused"], dense_gradient(), rtol=EQUAL, atol=EQUAL)


def test_a_hook_that_is_gone_costs_nothing() -> None:
    model = Stack().double()
    _optimizer, _ = attached(model, "fused")
    hook = model.a.weight.register_hook(lambda gradient: gradient)
    with formed() as names:
        model(X).backward()
        assert names == ["a.weight"]
        hook.remove()
        model(X).backward()
    assert names == ["a.weight"]


def test_a_hook_that_comes_between_forward_and_backward_is_refused() -> None:
    model = Stack().double()
    _optimizer, _ = attached(model, "fused")
    loss = model(X)
    model.a.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(RuntimeError, match=r"'a\.weight' has one that got None.*\"compressed\""):
        loss.backward()


def test_a_hook_that_comes_after_compilation_is_refused() -> None:
    # torch.compile looks at hooks once, when it compiles.
    model = Stack().double()
    _optimizer, _ = attached(model, "fused")
    call = torch.compile(model, backend="aot_eager")
    call(X).backward()
    seen: list[Tensor] = []
    model.a.weight.register_post_accumulate_grad_hook(seen.append)
    loss = call(X)
    with pytest.raises(RuntimeError, match=r"before it is compiled; 'a\.weight'"):
        loss.backward()
