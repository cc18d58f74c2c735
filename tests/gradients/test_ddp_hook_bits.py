# SPDX-License-Identifier: Apache-2.0
"""The communication hook in few bits: gradients are what an attached Flora would step on."""

from __future__ import annotations

import pytest
import torch

from flora_dist.core.sketch import ops
from flora_dist.ddp import FloraState, flora_hook
from tests.conftest import pool_of
from tests.gradients.faults import broken
from tests.gradients.small import SETTINGS, attached, my_inputs, on_ddp


def hooked_and_attached(bits: int, fault: str = "") -> float:
    """Farthest entry of the gradients that the hook leaves from C A of an attached Flora."""
    ddp, model = on_ddp()
    state = FloraState(
        model.named_parameters(), rank="block", block=SETTINGS["block"], wire_bits=bits
    )
    ddp.register_comm_hook(state, flora_hook)
    with broken(fault):
        ddp(my_inputs(0)).backward()
    other, inner = on_ddp()
    _, handle = attached(other, gradient_bits=bits)
    other(my_inputs(0)).backward()
    handle.gradients.reduce()
    farthest = 0.0
    for name, flow in handle.gradients.flows.items():
        mean = handle.gradients.mean_of(name)
        assert mean is not None
        records, columns = mean.tiles[0], flow.geometry.num_columns
        wanted = ops.expand(records[:, :, :], mean.sketch_ERB, num_columns=columns)
        got = model.get_parameter(name).grad
        assert got is not None
        farthest = max(farthest, float((got - wanted[0]).abs().max() / wanted.abs().max()))
    bias, same = model.first.bias.grad, inner.first.bias.grad
    torch.testing.assert_close(bias, same)
    return farthest


@pytest.mark.ranks(2)
@pytest.mark.parametrize("bits", [8, 1])
def test_the_hook_of_ddp_leaves_what_an_attached_flora_steps_on(bits: int) -> None:
    assert max(pool_of(2)(hooked_and_attached, bits)) < 1e-6
    if bits == 1:
        assert min(pool_of(2)(hooked_and_attached, bits, "owner's sum")) > 1e-2
