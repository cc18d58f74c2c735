# SPDX-License-Identifier: Apache-2.0
"""What a rank gives to the collectives of one optimizer step, and the bytes a ring sends for it.

A ring of w ranks moves (w - 1) / w of a buffer per pass from every rank: an all-reduce takes two
passes, a reduce-scatter and an all-gather one (Patarasuk & Yuan 2009; NCCL's model of bus
bandwidth). gloo takes two for a reduce-scatter. Sources of what is sent, and how often:

    ddp           one all-reduce of the gradients, after the last micro-batch (``no_sync``)
    fsdp2, hsdp   per micro-batch an all-gather of each layer before forward and before backward,
                  of the root once; one reduce-scatter of gradients in fp32 after the last
                  micro-batch (``set_requires_gradient_sync``), after each at level sharded; hsdp
                  within a node, with an all-reduce of what has arrived between nodes
    zero 0, 1     one all-reduce of the gradients (DeepSpeed's default for every bucket, 0.19)
    zero 2        the same after every micro-batch
    zero 3        a reduce-scatter after every micro-batch, and an all-gather of the weights, or two
                  where they are more than max_reuse_distance (10^9); of small parameters, which
                  stay whole, one after the step
    zero 1, 2     one all-gather of the updated weights
    sketches      one message per step: presence of each parameter and its sketches, a line for
                  every rank, each as long as the longest (gradients/average.py); in few bits
                  an all-to-all to owners, and of their means among replicas
                  (gradients/average_records.py)
    Flora's step  where parameters are sharded, an all-reduce of column sums
                  (core/step/matrix.py); rows that two ranks share, one at most where their spans
                  meet, are left out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flora_dist.cluster.planner.methods import Method, blocks_of
from flora_dist.cluster.planner.model import ROOT, Parameter
from flora_dist.cluster.planner.request import DENSE, WIRE_DTYPES, Request
from flora_dist.cluster.planner.shards import Shard, chunk, line_length, shards_by_rank, stays_whole
from flora_dist.core.records import FEW_BITS, FULL_BITS, Code, mean_bits
from flora_dist.core.state.settings import READ_LAST, FloraConfig

RING_PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "all_to_all": 1}
"""Kind of a collective -> passes over the ring."""
MAX_REUSE_DISTANCE = 1_000_000_000
"""Elements within which ZeRO-3 keeps what it has gathered: DeepSpeed's default."""
_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """Collectives of one kind and purpose, in one optimizer step."""

    purpose: str
    """"gradients", "sketches", "weights" or "messages"."""
    kind: str
    buffer: int
    """Bytes of the whole buffers."""
    ranks: int
    together: int = 1
    """Such groups that share a node's link: HSDP's, between nodes."""
    stays: bool = False
    """Within a node."""

    @property
    def sent(self) -> int:
        """Bytes that each rank sends."""
        return RING_PASSES[self.kind] * (self.ranks - 1) * self.buffer // self.ranks


def payloads(request: Request, method: Method) -> list[Payload]:
    """All that travels; nothing on one rank."""
    found = [*_of_gradients(request, method), *_of_weights(request, method)]
    found += [*_of_sketches(request, method), *_of_messages(request, method)]
    return [payload for payload in found if payload.ranks > 1 and payload.buffer]


def sent_bytes(found: Sequence[Payload]) -> int:
    """Bytes that each rank sends in a step."""
    return sum(payload.sent for payload in found)


def link_bytes(request: Request, found: Sequence[Payload]) -> int:
    """Bytes that the busiest link carries one way: a node's to the next, or a rank's on one node.

    A ring that visits node after node crosses each node's link with what one rank sends.
    """
    if request.nodes == 1:
        return sent_bytes(found)
    return sum(payload.sent * payload.together for payload in found if not payload.stays)


# ---- gradients


def _of_gradients(request: Request, method: Method) -> Iterator[Payload]:
    backend, ranks = method.backend, request.shards
    plain = [p for p in method.trained if method.sketch_of(p) is None]
    # Level sharded: the framework reduces all of them, every time.
    reduced = method.trained if method.level == "sharded" else plain
    numel = sum(parameter.numel for parameter in reduced)
    if backend.sharding == "rows":
        stored = sum(chunk(parameter, "rows", ranks) for parameter in reduced) * _FP32
        times = request.accumulate if method.level == "sharded" else 1
        yield from _scattered(request, "gradients", stored * times)
    elif backend.sharding == "each":
        stored = sum(chunk(parameter, "each", ranks) for parameter in reduced) * ranks
        size = stored * method.element * request.accumulate
        yield Payload(purpose="gradients", kind="reduce_scatter", buffer=size, ranks=ranks)
    else:
        element = _FP32 if backend.stage is None and not method.is_pure else method.element
        times = request.accumulate if backend.stage == 2 else 1
        size = numel * element * times
        yield Payload(purpose="gradients", kind="all_reduce", buffer=size, ranks=request.ranks)


def _of_sketches(request: Request, method: Method) -> Iterator[Payload]:
    if method.level in {DENSE, "sharded"}:
        return
    if method.sketch.wire_bits in FEW_BITS or method.sketch.bits != FULL_BITS:
        yield from _of_records(request, method)
        return
    half = method.sketch.wire_bits == 16
    longest = max(
        sum(_sketch_numbers(shard, method) for shard in shards)
        for shards in shards_by_rank(method.trained, method.backend.sharding, request.shards)
    )
    number = 2 if half else WIRE_DTYPES[request.wire_dtype]
    line = (_num_sketched(method) + longest) * number
    if method.backend.sharding == "whole":
        yield Payload(purpose="sketches", kind="all_reduce", buffer=line, ranks=request.ranks)
    else:
        yield from _scattered(request, "sketches", line)


def _of_records(request: Request, method: Method) -> Iterator[Payload]:
    """An all-to-all to who sums each, with flags for every rank; means gathered.

    There is a flag per parameter, and one of the rank itself. A block that two ranks of ZeRO keep
    is counted once.
    """
    wire_bits, everyone = method.sketch.wire_bits, request.ranks
    (everything,) = shards_by_rank(method.trained, "whole", 1)
    own = everything
    replicas = everyone
    if method.backend.sharding != "whole":
        own = shards_by_rank(method.trained, method.backend.sharding, request.shards)[0]
        replicas = everyone // request.shards
    sent = sum(_bytes_in(shard, method, wire_bits) for shard in everything)
    flags = (1 + _num_sketched(method)) * everyone
    # Not a ring: each of a node's ranks has a message of its own for those of the others.
    together = request.gpus
    yield Payload(
        purpose="sketches",
        kind="all_to_all",
        buffer=sent + flags,
        ranks=everyone,
        together=together,
    )
    kept = sum(_bytes_in(shard, method, mean_bits(wire_bits)) for shard in own)
    yield Payload(
        purpose="sketches", kind="all_to_all", buffer=kept, ranks=replicas, together=together
    )


def kept_bytes(shard: Shard, method: Method) -> int:
    """Of C for what a rank holds of a parameter; 0 where its gradient stays dense."""
    return _bytes_in(shard, method, method.sketch.bits)


def _bytes_in(shard: Shard, method: Method, bits: int) -> int:
    geometry = method.sketch_of(shard.parameter)
    if geometry is None or geometry.rank is None:
        return 0
    if bits == FULL_BITS:
        return _FP32 * _sketch_numbers(shard, method)
    blocks = sum(tile.num_blocks(geometry.block) for tile in shard.tiles)
    return blocks * Code(bits=bits, numbers=geometry.rank).bytes


def _sketch_numbers(shard: Shard, method: Method) -> int:
    geometry = method.sketch_of(shard.parameter)
    if geometry is None or geometry.rank is None:
        return 0
    return sum(tile.num_blocks(geometry.block) for tile in shard.tiles) * geometry.rank


def _num_sketched(method: Method) -> int:
    return sum(method.sketch_of(parameter) is not None for parameter in method.trained)


def _scattered(request: Request, purpose: str, kept: int) -> Iterator[Payload]:
    """A reduce-scatter that leaves ``kept`` bytes on each rank, and HSDP's all-reduce of them."""
    shards, replicas = request.shards, request.ranks // request.shards
    yield Payload(
        purpose=purpose,
        kind="reduce_scatter",
        buffer=kept * shards,
        ranks=shards,
        stays=replicas > 1,
    )
    yield Payload(purpose=purpose, kind="all_reduce", buffer=kept, ranks=replicas, together=shards)


# ---- weights


def _of_weights(request: Request, method: Method) -> Iterator[Payload]:
    backend, shards, element = method.backend, request.shards, method.element
    everything = (*method.trained, *method.frozen)
    size = 0
    if backend.sharding == "rows":
        size = request.accumulate * sum(
            (1 if parameter.layer == ROOT else 2) * chunk(parameter, "rows", shards)
            for parameter in everything
        )
        size *= shards * element
    elif backend.sharding == "line":
        size = line_length(method.trained, shards) * element
    elif backend.sharding == "each":
        numel = sum(parameter.numel for parameter in everything)
        again = request.accumulate * (1 if numel <= MAX_REUSE_DISTANCE else 2)
        size = sum(chunk(p, "each", shards) * (1 if stays_whole(p) else again) for p in everything)
        size *= shards * element
    stays = request.ranks > shards
    yield Payload(purpose="weights", kind="all_gather", buffer=size, ranks=shards, stays=stays)


# ---- Flora's own


def _of_messages(request: Request, method: Method) -> Iterator[Payload]:
    if method.flora is None or method.backend.sharding == "whole":
        return
    numbers = sum(_message_numbers(parameter, method.flora) for parameter in method.trained)
    yield Payload(
        purpose="messages",
        kind="all_reduce",
        buffer=numbers * _FP32,
        ranks=request.shards,
        stays=request.ranks > request.shards,
    )


def _message_numbers(parameter: Parameter, config: FloraConfig) -> int:
    """Presence, column sums, and what the clipped update's norm follows from (clip is on)."""
    geometry = blocks_of(parameter, config)
    if geometry.is_vector:
        return 2
    columns = geometry.num_matrices * geometry.num_columns
    if config.momentum in READ_LAST and geometry.rank is not None:
        return 1 + columns + geometry.num_matrices
    if config.momentum in {"flora", *READ_LAST}:
        return 1 + 3 * columns + geometry.num_matrices
    return 1 + 2 * columns
