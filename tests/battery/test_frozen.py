# SPDX-License-Identifier: Apache-2.0
"""Parameters that are frozen between backward and step: the same ones step on every layout."""

from __future__ import annotations

import pytest

from tests.battery import variants, zoo
from tests.battery.oracle import Case, distances
from tests.battery.test_layouts import EXACT
from tests.battery.variants import Gradients, Weights
from tests.battery.wrapped import LAYOUTS, optimizer_of, weights_of
from tests.conftest import pool_of

CASE = Case(settings={"momentum": "flora", "weight_decay": 0.1})
NAMES = ("up.weight", "experts", "up.bias")
FROZEN = range(3, 6)
"""Steps: kappa is 3, so a window changes on the way."""


def _freeze_late(layout: str) -> Weights:
    model = zoo.build(CASE.dtype)
    wrapped = LAYOUTS[layout].wrap(model)
    parameters = dict(wrapped.named_parameters())
    optimizer = optimizer_of(wrapped, **CASE.flora)
    late = [p for name, p in parameters.items() if variants.canonical_name(name) in NAMES]
    assert len(late) == len(NAMES)

    def freeze(step: int) -> None:
        for parameter in late:
            parameter.requires_grad_(step not in FROZEN)

    for step in range(variants.STEPS):
        for parameter in late:
            parameter.requires_grad_(True)
        optimizer.zero_grad()
        wrapped(variants.my_batch(step)).backward()
        freeze(step)
        optimizer.step()
    for parameter in late:
        parameter.requires_grad_(True)
    return weights_of(wrapped, model)


@pytest.mark.parametrize("layout", ["ddp x2", "fsdp2 x2", "fsdp1 x2"])
def test_what_is_frozen_after_backward_is_stepped_on_no_layout(layout: str) -> None:
    """FSDP2 skipped it; one process and DDP stepped it by the gradient that was left."""

    def without(step: int, gradients: Gradients) -> Gradients:
        missing = NAMES if step in FROZEN else ()
        return {name: None if name in missing else g for name, g in gradients.items()}

    expected = variants.follow(CASE, zoo.build(CASE.dtype), change=without)
    for weights in pool_of(2)(_freeze_late, layout):
        assert distances(*expected, weights)[1] < EXACT
