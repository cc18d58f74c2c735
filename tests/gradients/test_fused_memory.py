# SPDX-License-Identifier: Apache-2.0
"""What fused layers never form, and what they keep instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tests.gradients.small import attached, formed
from tests.gradients.test_fused_layers import EMBEDDINGS, USES, Layers, data, sums_of


@pytest.mark.parametrize("name", ["layers", "gpt2"])
def test_no_gradient_of_a_fused_weight_is_ever_formed(name: str) -> None:
    use = USES[name]
    seen: dict[str, set[str]] = {}
    for level in ("compressed", "fused"):
        model = use.build().double()
        _, handle = attached(model, level)
        with formed() as names:
            use.loss(model, data(0)).backward()
        seen[level] = set(names)
        assert sums_of(handle).keys() == handle.gradients.flows.keys()
    embeddings = {n for n in seen["compressed"] if n.rpartition(".")[0] in EMBEDDINGS}
    assert seen["fused"] == embeddings
    assert seen["compressed"] > embeddings


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for backward, but for weights."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values())


def test_a_layer_keeps_the_sketch_of_its_input_instead_of_the_input() -> None:
    x = torch.randn(100, 64)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    dense = saved_bytes(model, x)
    assert dense == 100 * (64 + 32) * 4
    _optimizer, _ = attached(model, "fused", {"rank": 1})
    # One number per block of 8, and A of both.
    assert saved_bytes(model, x) == dense // 8 + 2 * 8 * 4


def test_carriers_have_no_memory_and_are_not_in_the_state() -> None:
    model = Layers()
    before = list(model.state_dict()), len(list(model.buffers()))
    _, handle = attached(model, "fused")
    assert (list(model.state_dict()), len(list(model.buffers()))) == before
    for carrier in handle._fused._carriers.values():
        assert carrier.zeros_NKR.untyped_storage().nbytes() == 4
