# SPDX-License-Identifier: Apache-2.0
"""The planner's formulas by hand, and against the code whose numbers they foretell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flora_dist.cluster.planner import shards as cuts
from flora_dist.cluster.planner import wire
from flora_dist.cluster.planner.activations import MicroBatchShape, activation_bytes
from flora_dist.cluster.planner.config_file import read_model
from flora_dist.cluster.planner.estimate import Estimate, estimate
from flora_dist.cluster.planner.memory import memory
from flora_dist.cluster.planner.methods import (
    Method,
    adamw_4bit_state,
    adamw_8bit_state,
    apollo_state,
    asked,
    compared,
    flora_state,
    galore_8bit_state,
    galore_state,
    muon_state,
    others,
)
from flora_dist.cluster.planner.model import Model, Parameter, Sizes
from flora_dist.cluster.planner.request import BACKENDS, PRECISIONS, Request
from flora_dist.cluster.planner.search import search, sizes
from flora_dist.cluster.planner.shards import Shard, line_length, shards_by_rank
from flora_dist.cluster.planner.wire import payloads
from flora_dist.core.layouts.flat import FlatPart, cut_each, cut_line
from flora_dist.core.state.settings import MOMENTA, TWO_MOMENTS, FloraConfig
from flora_dist.core.state.spec import geometry_of, state_tensors
from tests.planner.measured import bytes_of, kept_by_autograd
from tests.planner.runs import MODELS
from tests.planner.test_model import FAMILIES

TINY = read_model(MODELS / "llama_tiny.json")
FLORA = FloraConfig(rank=8, block=64, state_dtype="float32")


def request(model: Model = TINY, backend: str = "fsdp2", **changes: object) -> Request:
    settings: dict[str, object] = {"gpus": 2, "sequence_length": 16, "bucket": 100, **changes}
    return Request(model=model, backend=BACKENDS[backend], flora=FLORA, **settings)  # type: ignore[arg-type]


# ---- by hand


def by_hand() -> Model:
    """An embedding of 5 x 64, a matrix of 6 x 64 in the one layer, a norm of 64."""
    shapes: list[tuple[str, tuple[int, ...], str, int]] = [
        ("embedding", (5, 64), "embedding", -1),
        ("matrix", (6, 64), "matrix", 0),
        ("norm", (64,), "vector", -1),
    ]
    return Model(
        name="by hand",
        family="llama",
        sizes=Sizes(
            vocabulary=5,
            positions=16,
            hidden=64,
            inner=64,
            layers=1,
            heads=1,
            key_value_heads=1,
            head_width=64,
            is_tied=True,
        ),
        parameters=tuple(
            Parameter(name=name, shape=shape, kind=kind, layer=layer)  # type: ignore[arg-type]
            for name, shape, kind, layer in shapes
        ),
    )


def test_fsdp2_by_hand() -> None:
    asks = request(by_hand(), gradients="compressed", gradient_bits=32)
    found = estimate(asks, asked(asks))
    # Rank 0 has 3 of 5 rows, 3 of 6, 32 of 64: 3 x 64 + 3 x 64 + 32 = 416 elements.
    assert found.held["weights"].total == 4 * 416
    assert found.held["weights"].tables == 4 * 192
    # The norm's gradient alone is dense.
    assert found.held["gradients"].total == 4 * 32
    # C: 8 numbers for the one block of each of 11 rows; A: 8 x 64 twice for each of two matrices.
    assert found.held["accumulators"].total == 4 * (11 * 8 + 2 * 2 * 8 * 64)
    # Momentum 8 a row and row mean 1 for 6 rows, column means 64 twice; norm: 32 and 32.
    assert found.held["state"].total == 4 * (6 * 9 + 128 + 64)
    # Root (embedding and norm, rounded up to 6 rows) gathered once, the layer twice; of each, half.
    assert found.wire["weights"] == 4 * (6 * 64 + 64 + 2 * 6 * 64) // 2
    assert found.wire["gradients"] == 4 * 64 // 2
    # Lines of 2 presences and 8 numbers for 6 rows.
    assert found.wire["sketches"] == 4 * 2 * (2 + 48) // 2
    # Presence and two sums of 64 columns of each matrix, two numbers of the norm; two passes.
    assert found.wire["messages"] == 4 * (129 + 129 + 2)


def test_few_bits_by_hand() -> None:
    asks = request(by_hand(), gradients="compressed")
    found = estimate(asks, asked(asks))
    assert found.label == "Flora 1/8, compressed, 4 bits"
    # 64 numbers in 4 bits and a scale for the one block of each of 11 rows; A twice, 64 x 64.
    assert found.held["accumulators"].total == 11 * (32 + 2) + 4 * 2 * 2 * 64 * 64
    # Half of them, and of three flags for each of two ranks, goes to the other rank.
    assert found.wire["sketches"] == (11 * 34 + 3 * 2) // 2
    asks = request(by_hand(), backend="ddp", gradients="compressed", gradient_bits=8, wire_bits=1)
    found = estimate(asks, asked(asks))
    assert found.held["accumulators"].total == 11 * (64 + 2) + 4 * 2 * 2 * 64 * 64
    # The means of what each has summed go back, in 4 bits.
    assert found.wire["sketches"] == (11 * 10 + 3 * 2) // 2 + 11 * 34 // 2


def test_zero2_by_hand() -> None:
    asks = request(by_hand(), backend="zero2", precision="bfloat16", accumulate=3)
    found = estimate(asks, asked(asks))
    # 320 + 384 + 64 = 768 elements, a multiple of 4: 384 a rank, rank 0 with 64 of the matrix.
    assert found.held["weights"].total == 2 * 768 + 4 * 384
    # Embedding and matrix whole on rank 0; matrix and norm, 448, on rank 1.
    assert found.held["gradients"].total == 2 * (320 + 384)
    # All-reduces of three micro-batches in two passes, an all-gather in one.
    assert found.wire["gradients"] == 3 * 2 * 768
    assert found.wire["weights"] == 2 * 768 // 2


def test_zero3_gathers_small_parameters_once_a_step_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In the place of 100,000: embedding and norm, 320 and 64 elements, stay whole; 384 do not.
    monkeypatch.setattr(cuts, "PERSISTENT", 320)
    asks = request(by_hand(), backend="zero3", precision="bfloat16-pure", accumulate=3)
    found = estimate(asks, asked(asks))
    assert found.held["weights"].total == 2 * (768 // 2 + 320 + 64)
    assert found.wire["weights"] == 2 * (3 * 384 + 320 + 64) // 2
    monkeypatch.setattr(wire, "MAX_REUSE_DISTANCE", 767)  # gathered for backward once more
    assert estimate(asks, asked(asks)).wire["weights"] == 2 * (6 * 384 + 320 + 64) // 2


def test_without_fp32_weights_by_hand() -> None:
    asks = request(by_hand(), backend="zero2", precision="bfloat16-pure")
    assert estimate(asks, asked(asks)).held["weights"].total == 2 * 768
    asks = request(by_hand(), precision="bfloat16-pure")
    found = estimate(asks, asked(asks))
    assert found.held["weights"].total == found.held["gradients"].total == 2 * 416
    asks = request(by_hand(), backend="ddp", precision="bfloat16-pure")
    found = estimate(asks, asked(asks))
    assert found.held["weights"].total == found.held["gradients"].total == 2 * 768
    assert found.wire["gradients"] == 2 * 768


def test_seconds_follow_from_the_busiest_link() -> None:
    asks = request(by_hand(), backend="hsdp", nodes=3, gpus=2)
    found = estimate(asks, asked(asks))
    between = [p for p in payloads(asks, asked(asks)) if not p.stays]
    # Rank's shard of 416 fp32 gradients, all-reduced among 3 nodes by each of a node's 2 ranks.
    assert [p.buffer for p in between] == [4 * 416]
    assert found.link == 2 * (2 * 2 * 4 * 416 // 3)
    assert found.seconds(8e-9 * found.link) == pytest.approx(1.0)


def test_states_of_other_optimizers_by_hand() -> None:
    matrix = Parameter(name="m", shape=(128, 512), kind="matrix", layer=0)
    shard = shards_by_rank((matrix,), "whole", 1)[0][0]
    assert adamw_8bit_state(shard) == 2 * (65536 + 4 * 256)
    assert adamw_4bit_state(shard) == 2 * (32768 + 4 * 512)
    assert muon_state(shard) == 4 * 65536
    assert galore_state(shard, rank=32) == 2 * (32 * 128 + 2 * 32 * 512)
    assert galore_8bit_state(shard, rank=32) == 2 * 32 * 128 + 2 * (32 * 512 + 4 * 64)
    assert apollo_state(shard, rank=32) == 2 * (2 * 32 * 512 + 2)
    of_experts = replace(shard, parameter=replace(matrix, shape=(4, 128, 512), kind="experts"))
    assert apollo_state(of_experts, rank=1) == 4 * apollo_state(shard, rank=1)
    norm = replace(shard, parameter=replace(matrix, shape=(512,), kind="vector"), elements=512)
    assert adamw_8bit_state(norm) == adamw_4bit_state(norm) == muon_state(norm) == 8 * 512
    assert galore_state(norm, rank=32) == apollo_state(norm, rank=32) == 4 * 512


def test_lora_trains_two_factors_of_each_matrix_of_the_layers() -> None:
    asks = request(by_hand(), lora_rank=4)
    [lora] = [method for method in others(asks) if method.label.startswith("LoRA")]
    assert [p.shape for p in lora.trained] == [(4, 64), (6, 4)]
    # Of them rank 0 has 2 x 64 and 3 x 4 elements, and 416 frozen ones.
    held = memory(asks, lora)
    assert held["state"].total == 8 * (128 + 12)
    assert held["weights"].total == 4 * (128 + 12 + 416)


# ---- against the code


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_zeros_cuts_are_those_of_the_layouts(ranks: int) -> None:
    shapes = [(p.name, p.shape) for p in TINY.parameters]
    offsets = [sum(p.numel for p in TINY.parameters[:i]) for i in range(len(shapes))]
    size = line_length(TINY.parameters, ranks) // ranks
    chunks = [-(-p.numel // ranks) for p in TINY.parameters]
    lines = cut_line(shapes, offsets=offsets, size=size, rank=0, world_size=ranks)
    each = cut_each(shapes, sizes=chunks, world_size=ranks)
    for sharding, spans in (("line", lines), ("each", each)):
        for rank, shards in zip(_chosen(sharding, ranks), _shards(sharding, ranks), strict=True):
            owned = {s.name: s.owned[rank] for s in spans if s.owned[rank][0] < s.owned[rank][1]}
            assert {s.parameter.name: s.elements for s in shards} == {
                name: stop - start for name, (start, stop) in owned.items()
            }
            for shard in shards:
                assert _state_there(shard, owned[shard.parameter.name]) == flora_state(
                    shard, config=FLORA
                )


def _shards(sharding: str, ranks: int) -> tuple[tuple[Shard, ...], ...]:
    return shards_by_rank(TINY.parameters, sharding, ranks)  # type: ignore[arg-type]


def _chosen(sharding: str, ranks: int) -> list[int]:
    if sharding == "line":
        return list(range(ranks))
    return sorted({0, 1, ranks // 2, ranks - 1} & set(range(ranks)))


def _state_there(shard: Shard, owned: tuple[int, int]) -> int:
    """Bytes that the layout of flat tensors allocates."""
    name, shape = shard.parameter.name, shard.parameter.shape
    [span] = cut_line(
        [(name, shape)], offsets=[0], size=shard.parameter.numel, rank=0, world_size=1
    )
    part = FlatPart(
        span=span,
        rank=0,
        flat=torch.zeros(0),
        tiles=shard.tiles,
        num_elements=owned[1] - owned[0],
        reducer=None,
    )
    entries = state_tensors(geometry_of(name, shape, FLORA), FLORA)
    return sum(part.allocate(entry, torch.float32).nbytes for entry in entries)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 300])
def test_fsdp2s_chunk_is_torchs(ranks: int) -> None:
    for shard in shards_by_rank(TINY.parameters, "rows", ranks)[0]:
        first = torch.chunk(torch.empty(shard.parameter.shape, device="meta"), ranks)[0]
        assert shard.stored == shard.elements == first.numel()


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize(
    "kept",
    [{"state_dtype": None}, {}, {"state_dtype": "bfloat16"}, {"state_bits": 4}],
    ids=str,
)
def test_floras_state_on_one_rank_is_what_the_optimizer_reports(
    momentum: str, kept: dict[str, Any]
) -> None:
    from flora_dist import Flora

    if momentum in TWO_MOMENTS:
        kept = {name: value for name, value in kept.items() if name != "state_bits"}
    config = replace(FLORA, momentum=momentum, **kept)
    named = [(p.name, nn.Parameter(torch.zeros(p.shape))) for p in TINY.parameters]
    own = {"rank": config.rank, "state_dtype": config.state_dtype, **kept}
    optimizer = Flora(named, lr=1e-3, momentum=momentum, **own)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shards = shards_by_rank(TINY.parameters, "whole", 1)[0]
    assert sum(flora_state(s, config=config) for s in shards) == optimizer.report().state_bytes


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast", "fused"])
@pytest.mark.parametrize("name", ["llama_tiny", "gpt2"])
def test_activations_are_what_autograd_keeps(name: str, how: str, tmp_path: Path) -> None:
    model = small(name, tmp_path)
    batch = MicroBatchShape(
        sequences=2,
        length=16,
        element=4 if how in {"float32", "fused"} else 2,
        autocast=how == "autocast",
    )
    fused = (FLORA.rank or 0, 64) if how == "fused" else None
    kept = bytes_of(kept_by_autograd(tmp_path / f"{name}.json", (2, 16), how))
    # A scalar, and GPT-2's places of tokens.
    assert 0 <= kept - activation_bytes(model, batch, fused) <= 4 + 16 * 8


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("gemma2")])
def test_so_they_are_of_the_other_families(name: str, precision: str, tmp_path: Path) -> None:
    settings = {**FAMILIES[name], "decoder_start_token_id": 0}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    batch = MicroBatchShape(sequences=2, length=16, element=PRECISIONS[precision])
    kept = bytes_of(kept_by_autograd(path, (2, 16), precision))
    # Scalars: the loss, Gemma's factor of embeddings.
    assert 0 <= kept - activation_bytes(read_model(path), batch) <= 8


def small(name: str, folder: Path) -> Model:
    """Two layers, few words."""
    text = (MODELS / f"{name}.json").read_text(encoding="utf-8")
    small = text.replace("50257", "300").replace('"n_layer": 12', '"n_layer": 2')
    path = folder / f"{name}.json"
    path.write_text(small.replace("768", "96"), encoding="utf-8")
    return read_model(path)


def test_checkpointing_keeps_inputs_and_one_layer_at_a_time() -> None:
    batch = MicroBatchShape(sequences=2, length=16, element=4)
    one, two, three = (
        activation_bytes(replace(TINY, sizes=replace(TINY.sizes, layers=n)), batch)
        for n in (1, 2, 3)
    )
    layer, inputs = two - one, 2 * 2 * 16 * 32 * 4
    assert three - two == layer
    rest = one - layer
    kept = activation_bytes(TINY, replace(batch, checkpointing=True))
    assert kept == inputs + max(layer, rest)


# ---- all methods, and the search


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_method_can_be_planned_on_every_backend(backend: str, precision: str) -> None:
    asks = request(backend=backend, nodes=2, precision=precision, accumulate=2)
    plans = [estimate(asks, method) for method in compared(asks)]
    assert len({each.label for each in plans}) == len(plans)
    assert all(held.total >= held.tables >= 0 for each in plans for held in each.held.values())
    galore = next(each for each in plans if each.label.startswith("GaLore"))
    assert galore.backend == "ddp"


def test_nothing_travels_on_one_rank() -> None:
    for backend in BACKENDS:
        asks = request(backend=backend, gpus=1)
        assert estimate(asks, asked(asks)).sent == 0


def test_the_search_finds_the_first_cluster_that_fits_and_no_smaller_does() -> None:
    asks = request(read_model(MODELS / "llama_130m.json"), gpus=4, sequence_length=64)
    memory = 750 * 2**20

    def methods(cluster: Request) -> list[Method]:
        return [asked(cluster), *others(cluster)]

    found = search(asks, lambda cluster: iter(methods(cluster)), memory)
    for place, each in enumerate(found):
        totals: list[tuple[tuple[int, int], Estimate]] = []
        for nodes, gpus in sizes(4, limit=1024):
            cluster = replace(asks, nodes=nodes, gpus=gpus)
            totals.append(((nodes, gpus), estimate(cluster, methods(cluster)[place])))
            if totals[-1][1].total <= memory:
                break
        (nodes, gpus), last = totals[-1]
        assert (each.fits, each.nodes, each.gpus) == (last.total <= memory, nodes, gpus)
    # What is sharded fits somewhere; what is replicated, on one rank alone or nowhere.
    for each in found:
        is_replicated = each.estimate.label.endswith("(ddp)")
        assert each.fits != is_replicated or (each.nodes, each.gpus) == (1, 1)
