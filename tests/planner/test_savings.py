# SPDX-License-Identifier: Apache-2.0
"""What steps in backward and losses in chunks save: by hand, and against autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flora_dist.cluster.planner import temporary
from flora_dist.cluster.planner.activations import MicroBatchShape, activation_bytes
from flora_dist.cluster.planner.config_file import read_model
from flora_dist.cluster.planner.estimate import estimate
from flora_dist.cluster.planner.memory import memory
from flora_dist.cluster.planner.methods import asked, compared, others
from flora_dist.cluster.planner.request import BACKENDS, PRECISIONS
from flora_dist.cluster.planner.shards import line_length
from flora_dist.cluster.planner.temporary import PIECES
from flora_dist.core.step.views import CPU_ELEMENTS, GPU_ELEMENTS
from tests.planner.measured import LOSS_CHUNK, bytes_of, kept_by_autograd
from tests.planner.runs import MODELS
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
    # Logits of 4 tokens, in fp32 twice, and the head's gradient; or a sketched gradient.
    making, sketched = 257 * (4 * (8 + 2) + 4 * 32), (2 + 4) * 257 * 32
    assert found["temporary"].total == max(making, sketched)
    dense = replace(asks, gradients="dense", loss_chunk=100, accumulate=2)
    found = estimate(dense, asked(dense)).held
    assert found["temporary"].total == 257 * (16 * (8 + 2) + 4 * 32)


def test_pieces_of_sketched_gradients_are_those_of_the_step() -> None:
    assert PIECES == {"cpu": CPU_ELEMENTS, "cuda": GPU_ELEMENTS}


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


def test_of_one_micro_batch_on_one_rank_no_gradient_is_there_beside_the_logits() -> None:
    asks = request(by_hand(), backend="ddp", gpus=1, precision="bfloat16-pure")
    one, several = (
        estimate(each, asked(each)).held for each in (asks, replace(asks, accumulate=2))
    )
    logits = 2 * 16 * 5 * 4  # of 16 tokens and 5 words, twice in fp32
    assert one["gradients"].total == 2 * 768
    assert one["temporary"].total == 0 == max(0, logits - 2 * 768)
    assert several["temporary"].total == max(logits, 2 * 384)
    within = replace(asks, step_in_backward=True, sequence_length=16, micro_batch=4)
    assert estimate(within, asked(within)).held["temporary"].total == 4 * logits - 2 * 384


def test_on_cpus_gloo_copies_gathered_weights_and_sketches_are_of_small_pieces() -> None:
    model = read_model(MODELS / "llama_9m.json")
    asks = request(
        model, backend="zero2", precision="bfloat16-pure", gradients="compressed", accumulate=2
    )
    on_cpu = replace(asks, device="cpu", bucket=10_000_000)
    gpu, cpu = (estimate(each, asked(each)).held for each in (asks, on_cpu))
    # The line in bfloat16 once more, which is one bucket, when activations are gone.
    line = 2 * line_length(model.parameters, 2)
    assert cpu["temporary"].total == line - cpu["activations"].total
    # On a GPU all of the largest in fp32 beside it: 32,000 x 128 elements.
    assert gpu["temporary"].total == (2 + 4) * 32_000 * 128
    alone = replace(on_cpu, gpus=1, backend=BACKENDS["ddp"])
    assert estimate(alone, asked(alone)).held["temporary"].total == (
        2 * 32_000 * 128 + 4 * CPU_ELEMENTS
    )


def test_gloo_gathers_weights_that_flora_steps_a_bucket_at_a_time() -> None:
    model = read_model(MODELS / "llama_9m.json")
    assert line_length(model.parameters, 2) == 8_995_968
    asks = request(model, backend="zero2", device="cpu")
    sizes = {}
    for bucket in (500_000_000, 5_000_000, 4_000_000, 1_300_000):
        each = replace(asks, bucket=bucket)
        sizes[bucket] = temporary._gathered_at_once(each, asked(each))
    # Of 2 buckets in the line halves, of 6 sixths: parts are cut at even places, the rest is last.
    assert list(sizes.values()) == [8_995_968, 8_995_968, 4_497_984, 1_499_328]
    odd = replace(asks, bucket=1_000_000)
    assert temporary._gathered_at_once(odd, asked(odd)) == 2 * (4_497_984 - 7 * 562_248)
    [adamw] = [method for method in others(odd) if method.label == "AdamW"]
    assert temporary._gathered_at_once(odd, adamw) == 8_995_968


def test_where_shards_rest_in_the_hosts_memory_by_hand() -> None:
    asks = request(by_hand(), precision="bfloat16", accumulate=2)
    resting = replace(asks, cpu_offload=True)
    here, there = (estimate(each, asked(each)) for each in (asks, resting))
    assert there.held["weights"].total == there.held["state"].total == 0
    # Unsynchronised gradients are whole and stay; FSDP2's shard of 416 goes.
    assert there.held["gradients"].total == here.held["gradients"].total == 4 * 768
    assert there.host == 4 * 416 + here.held["state"].total + 4 * 416
    # A unit's shards in fp32 as they come: 384 elements of 2 ranks.
    assert there.held["temporary"].total == here.held["temporary"].total + 4 * 384 // 2
    assert here.host == 0
    assert there.as_json(1.0)["host_bytes_per_rank"] == there.host
    synchronised = replace(resting, accumulate=1)
    assert estimate(synchronised, asked(synchronised)).held["gradients"].total == 0
    (galore,) = (m for m in others(resting) if m.label.startswith("GaLore"))
    assert estimate(resting, galore).host == 0  # on ddp


@pytest.mark.parametrize("wrong", [{"backend": "ddp"}, {"device": "cpu"}])
def test_shards_rest_elsewhere_only_where_fsdp2_holds_them_on_a_gpu(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--cpu-offload moves FSDP2's shards off a GPU"):
        request(by_hand(), cpu_offload=True, **wrong)  # type: ignore[arg-type]


def test_adamw_on_cpus_makes_a_root_and_a_quotient_of_a_tensor() -> None:
    asks = request(by_hand(), backend="ddp", gpus=1, device="cpu", accumulate=2)
    [adamw] = [method for method in others(asks) if method.label == "AdamW"]
    held = memory(asks, adamw)
    assert held["temporary"].total == max(
        2 * 16 * 5 * 4, 4 * 384, 2 * 4 * 384 - held["activations"].total
    )
    # Of ZeRO-2's part at once, whose gradients in bfloat16 are its flat copy in fp32 by then.
    model = read_model(MODELS / "llama_9m.json")
    asks = request(model, backend="zero2", precision="bfloat16", device="cpu")
    [adamw] = [method for method in others(asks) if method.label == "AdamW"]
    held, part = memory(asks, adamw), line_length(model.parameters, 2) // 2
    gone = held["gradients"].total + held["activations"].total
    assert held["temporary"].total == 3 * 4 * part - gone
    # Of a part of eight and a small bucket the weights that gloo gathers are more.
    of_eight = replace(asks, gpus=8, bucket=1000)
    [adamw] = [method for method in others(of_eight) if method.label == "AdamW"]
    held, line = memory(of_eight, adamw), 2 * line_length(model.parameters, 8)
    assert held["temporary"].total == line - held["activations"].total


def test_zero_3_steps_a_flat_copy_of_its_part_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(MODELS / "llama_9m.json")
    asks = request(model, backend="zero3", precision="bfloat16", device="cpu")
    part, widest = line_length(model.parameters, 2) // 2, 32_000 * 128 // 2
    [adamw] = [method for method in others(asks) if method.label == "AdamW"]
    held = memory(asks, adamw)
    # Gradients in fp32, a root and a quotient; the buffer of gradients in bfloat16 stays.
    assert held["temporary"].total == 3 * 4 * part - held["activations"].total
    # Flora's: in bfloat16 and in fp32, or in bfloat16 alone, or fp64 of the largest for its norm.
    dense, alone = (replace(asks, precision=each) for each in ("bfloat16", "bfloat16-pure"))
    in_step = temporary._in_step_of_chunks
    assert in_step(dense, asked(dense)) == (2 + 4) * part
    assert in_step(alone, asked(alone)) == max(2 * part, 8 * widest)
    # What is sketched is not copied: norms of 128 elements are left, 64 on each rank.
    sketched = replace(dense, gradients="compressed")
    norms = sum(p.kind == "vector" for p in model.parameters)
    assert in_step(sketched, asked(sketched)) == (2 + 4) * 64 * norms
    monkeypatch.setattr(temporary, "SUB_GROUP", 1000)
    assert in_step(dense, asked(dense)) == max((2 + 4) * 1000, 8 * widest)


def test_zero_3_holds_what_it_prefetches_beside_weights_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = read_model(MODELS / "llama_9m.json")
    asks = request(model, backend="zero3", precision="bfloat16-pure", gradients="compressed")
    on_cpu, alone = replace(asks, device="cpu"), replace(asks, gpus=1)
    # All but the embedding in one bucket, and gathered weights, which are copied out of it.
    held = estimate(on_cpu, asked(on_cpu)).held
    weights, ahead = 8_995_968, 8_995_968 - 32_000 * 128
    assert held["temporary"].total == 2 * (weights + ahead)
    # Of small buckets one is copied, and gloo has a copy of the next; one rank gathers nothing.
    monkeypatch.setattr(temporary, "PREFETCH", 1_000_000)
    prefetched = [temporary._prefetched(each, asked(each)) for each in (on_cpu, asks, alone)]
    assert prefetched == [2_000_000, 1_000_000, 0]
    monkeypatch.setattr(temporary, "PREFETCH", ahead - 10)
    assert temporary._prefetched(on_cpu, asked(on_cpu)) == ahead
