# SPDX-License-Identifier: Apache-2.0
"""The numbers of flora_dist/README.md's worked example."""

from __future__ import annotations

import torch
from torch import nn

from flora_dist import Flora

GRADIENT = [
    [4.0, 0, 2, 0, 0, 0, 0, 0],
    [0.0, 4, 0, 2, 0, 0, 0, 0],
    [0.0, 0, 0, 0, 3, 1, 3, 1],
    [1.0, 1, 1, 1, 1, 1, 1, 1],
]


def test_the_worked_example_gives_the_numbers_in_the_readme() -> None:
    weight = nn.Parameter(torch.zeros(4, 8))
    weight.grad = torch.tensor(GRADIENT)
    optimizer = Flora([("w", weight)], lr=0.1, rank=2, block=4, state_dtype="float32")
    optimizer.step()
    state = optimizer.state[weight]
    close = {"rtol": 0, "atol": 0.006}
    torch.testing.assert_close(state["row"], torch.tensor([2.5, 2.5, 2.5, 1]), **close)
    columns = torch.tensor([4.25, 4.25, 1.25, 1.25, 2.5, 0.5, 2.5, 0.5])
    torch.testing.assert_close(state["column"], columns, **close)
    assert state["momentum"].numel() == 16
    torch.testing.assert_close(state["momentum"][0, 0], torch.tensor([0.23, 0.01]), **close)
    moved = torch.tensor([-0.09, 0.08, -0.09, -0.07])
    torch.testing.assert_close(weight.detach()[0, :4], moved, **close)
