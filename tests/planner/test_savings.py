# SPDX-License-Identifier: Apache-2.0
"""What steps in backward and losses in chunks save: by hand, and against autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flora_dist.cluster.planner.activations import MicroBatchShape, activation_bytes
from flora_dist.cluster.planner.estimate import estimate
from flora_dist.cluster.planner.memory import PIECE
from flora_dist.cluster.planner.methods import asked, compared
from flora_dist.cluster.planner.request import PRECISIONS
from flora_dist.core.step.views import GPU_ELEMENTS
from tests.planner.measured import LOSS_CHUNK, bytes_of, kept_by_autograd
from tests.planner.test_arithmetic import by_hand, request, small


def test_steps_in_backward_by_hand() -> None:
    asks = request(by_hand(), step_in_backward=True)
    found = estimate(asks, asked(asks))
    assert found.label == "Flora 1/8, dense, in backward"
    # The root: 3 of 5 rows and half of the norm; the layer has 3 of 6 rows.
    assert found.held["gradients"].total == 4 * (3 * 64 + 32)
    asks = request(by_hand(), backend="ddp", gpus=1, precision="bfloat16-pure")
    within = replace(asks, step_in_backward=True)
    assert estimate(within, asked(within)).held["gradients"].total == 2 * 6 * 64
    # Of several micro-batches sketches are kept, and what is not sketched.
    several = replace(within, gradients="compressed", accumulate=3)
    after = replace(several, step_in_backward=False)
    plans = [estimate(each, asked(each)) for each in (several, after)]
    assert [plan.held["gradients"].total for plan in plans] == [2 * 64, 2 * 64]
    # Where only some methods can, the others are planned with steps after backward.
    labels = {method.label for method in compared(several)}
    within_and_after = {"compressed, bf16 alone, in backward", "dense, bf16 alone"}
    assert {f"Flora 1/8, {label}" for label in within_and_after} < labels


def test_losses_in_chunks_by_hand() -> None:
    asks = request(backend="ddp", gpus=1, precision="bfloat16-pure", gradients="compressed")
    chunked = replace(asks, loss_chunk=4)
    whole, found = (estimate(each, asked(each)).held for each in (asks, chunked))
    # Of 16 tokens: softmax of 257 words in fp32 and labels are not kept.
    saved = whole["activations"].total - found["activations"].total
    assert saved == 16 * (4 * 257 + 8)
    # Logits of 4 tokens in both precisions, and the head's gradient; or a sketched gradient.
    making, sketched = 257 * (4 * (4 + 2) + 4 * 32), (2 + 4) * 257 * 32
    assert found["temporary"].total == max(making, sketched)
    dense = replace(asks, gradients="dense", loss_chunk=100)
    temporary = estimate(dense, asked(dense)).held["temporary"].total
    assert temporary == 257 * (16 * (4 + 2) + 4 * 32)


def test_pieces_of_sketched_gradients_are_those_of_the_step() -> None:
    assert PIECE == GPU_ELEMENTS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_tiny", "gpt2"])
def test_with_losses_in_chunks_activations_are_what_autograd_keeps(
    name: str, precision: str, tmp_path: Path
) -> None:
    model = small(name, tmp_path)
    batch = MicroBatchShape(
        sequences=2, length=16, element=PRECISIONS[precision], loss_chunk=LOSS_CHUNK
    )
    path = tmp_path / f"{name}.json"
    kept = bytes_of(kept_by_autograd(path, (2, 16), f"{precision}, chunked"))
    # That of the head, in fp32, is among the gradients, or temporary.
    head = 4 * model.sizes.vocabulary * model.sizes.hidden
    assert 0 <= kept - head - activation_bytes(model, batch) <= 4 + 16 * 8
