# SPDX-License-Identifier: Apache-2.0
"""Bytes that the fullest rank holds, category by category.

weights       parameters at rest between steps, with the fp32 masters that ZeRO steps. FSDP2: fp32
              shards, each row count rounded up to the ranks. DDP: fp32 (bfloat16 is autocast).
              bfloat16-pure: the same in bfloat16, and no masters.
              ZeRO 0: the model, fp32 copies where it is in bfloat16. ZeRO 1, 2: the model's padded
              line, and fp32 masters of one part. ZeRO 3: a chunk of each parameter and its fp32
              master; parameters of up to 100,000 elements whole besides.
gradients     elements held after a backward, at the most: between micro-batches or before the step.
              FSDP2: shards in fp32, or whole fp32 gradients while micro-batches are not
              synchronised. ZeRO 1, 2 keep every parameter of which the rank owns a
              piece, whole (stage_1_and_2.py, get_all_grad_tensors); ZeRO 1 all, between
              micro-batches, and the bucket that they are views of. ZeRO 3: its permanent buffer of
              a chunk of each, and its bucket. Where gradients are sketched, of the dense ones
              alone, and no bucket is larger than all of these (frameworks/deepspeed/lean.py).
              Stepped in backward: of the largest parameter, or FSDP2's largest unit in shards.
accumulators  sketches C of what is sketched in fp32, of whole parameters (``compressed``,
              ``fused``) or of shards (``sharded``), and the matrices A of this step and the last.
state         methods.py.
activations   activations.py; with LoRA also X A^T of each adapter.
temporary     temporary.py: not exact.

The total is all of them at once: gradients grow while activations go, so a real peak is
mostly lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flora_dist.cluster.planner.activations import activation_bytes, head_activation_bytes
from flora_dist.cluster.planner.methods import FP32, Method
from flora_dist.cluster.planner.model import TABLES
from flora_dist.cluster.planner.request import DENSE, Request, Sharding
from flora_dist.cluster.planner.shards import Shard, line_length, shards_by_rank, stays_whole
from flora_dist.cluster.planner.temporary import (
    bucket_elements,
    dense_of,
    is_offloaded,
    largest_of,
    numel_of,
    own_element,
    temporary_bytes,
)
from flora_dist.cluster.planner.wire import kept_bytes

Ranks = Sequence[Sequence[Shard]]
"""Shares of every rank that may hold most of something."""
CATEGORIES = ("weights", "gradients", "accumulators", "state", "activations", "temporary")
"""In the order in which they are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryBytes:
    """Bytes of one category on the rank that holds most of it."""

    total: int
    tables: int = 0
    """Of them, of embeddings and head."""


def memory(request: Request, method: Method) -> dict[str, CategoryBytes]:
    """Bytes by category, of a GPU where shards rest in the host's memory."""
    held = _everywhere(request, method)
    if not is_offloaded(request, method):
        return held
    nothing = CategoryBytes(total=0)
    gradients = held["gradients"] if _is_unsynchronised(request, method) else nothing
    return {**held, "weights": nothing, "gradients": gradients, "state": nothing}


def host_bytes(request: Request, method: Method) -> int:
    """Bytes of a rank's shards that rest in the host's memory: weights, gradients, state."""
    if not is_offloaded(request, method):
        return 0
    held, ranks = (
        _everywhere(request, method),
        shards_by_rank(method.trained, "rows", request.shards),
    )
    gradients = _shards_of_gradients(method, ranks)
    return held["weights"].total + held["state"].total + gradients.total


def _everywhere(request: Request, method: Method) -> dict[str, CategoryBytes]:
    ranks = shards_by_rank(method.trained, method.backend.sharding, request.shards)
    gradients = _gradients(request, method, ranks)
    kept, at_head = _activations(request, method)
    return {
        "weights": _weights(request, method, ranks),
        "gradients": gradients,
        "accumulators": _accumulators(request, method),
        "state": _most(_sum(shards, method.state) for shards in ranks),
        "activations": CategoryBytes(total=kept),
        "temporary": CategoryBytes(
            total=temporary_bytes(
                request, method, gradients=gradients.total, kept=kept, at_head=at_head
            )
        ),
    }


def _most(held: Iterable[CategoryBytes]) -> CategoryBytes:
    return max(held, key=lambda each: each.total)


def _sum(shards: Iterable[Shard], of: Callable[[Shard], int]) -> CategoryBytes:
    found = [(shard.parameter.kind in TABLES, of(shard)) for shard in shards]
    return _category(found)


def _category(found: Sequence[tuple[bool, int]]) -> CategoryBytes:
    return CategoryBytes(
        total=sum(size for _, size in found),
        tables=sum(size for is_table, size in found if is_table),
    )


# ---- weights


def _frozen_sharding(method: Method) -> Sharding:
    """ZeRO 1 and 2 leave what is not trained whole."""
    return "whole" if method.backend.sharding == "line" else method.backend.sharding


def _weights(request: Request, method: Method, ranks: Ranks) -> CategoryBytes:
    backend, element, masters = method.backend, method.element, 0 if method.is_pure else FP32
    if backend.stage is None:
        trained = _sum(ranks[0], lambda shard: (masters or element) * shard.stored)
    elif backend.sharding == "whole":
        copies = 0 if element == FP32 else FP32
        trained = _sum(ranks[0], lambda shard: (element + copies) * shard.stored)
    elif backend.sharding == "line":
        trained = _line_weights(request, method, ranks)
    else:
        trained = _sum(ranks[0], lambda shard: _chunk_bytes(shard, element, masters))
    frozen = shards_by_rank(method.frozen, _frozen_sharding(method), request.shards)[0]
    rest = _sum(frozen, lambda shard: element * shard.stored)
    return CategoryBytes(total=trained.total + rest.total, tables=trained.tables + rest.tables)


def _line_weights(request: Request, method: Method, ranks: Ranks) -> CategoryBytes:
    """The whole line, and fp32 masters of one part of it, both with their padding.

    All parts are of one size; of tables, the part that has most of them.
    """
    line = line_length(method.trained, request.shards)
    tables = sum(p.numel for p in method.trained if p.kind in TABLES)
    owned = max(_sum(shards, lambda shard: shard.elements).tables for shards in ranks)
    masters = 0 if method.is_pure else FP32
    return CategoryBytes(
        total=method.element * line + masters * line // request.shards,
        tables=method.element * tables + masters * owned,
    )


def _chunk_bytes(shard: Shard, element: int, masters: int) -> int:
    whole = element * shard.parameter.numel if stays_whole(shard.parameter) else 0
    return (element + masters) * shard.stored + whole


# ---- gradients


def _gradients(request: Request, method: Method, ranks: Ranks) -> CategoryBytes:
    backend, element = method.backend, method.element
    if method.in_backward:
        return CategoryBytes(total=_in_backward(request, method))
    dense = frozenset(p.name for p in method.trained if method.sketch_of(p) is None)
    unsynchronised = _is_unsynchronised(request, method)
    bucket = element * bucket_elements(request, method)
    if backend.sharding == "each":
        flat = _sum(
            ranks[0], lambda shard: element * shard.stored * (shard.parameter.name in dense)
        )
        return CategoryBytes(total=flat.total + bucket, tables=flat.tables)
    if backend.sharding == "line":
        parts = _most(_sum(shards, partial(_whole_bytes, element, dense)) for shards in ranks)
        is_kept = backend.stage == 1 and unsynchronised
        if not is_kept:
            return parts
        between = _whole(method, dense, element)
        return _most([parts, replace(between, total=between.total + bucket)])
    if backend.sharding == "rows" and unsynchronised:
        return _whole(method, dense, FP32)  # as they are reduced
    if backend.stage is None:
        element = own_element(method)
    if backend.sharding == "whole":
        return _whole(method, dense, element)
    return _shards_of_gradients(method, ranks)


def _is_unsynchronised(request: Request, method: Method) -> bool:
    """Gradients stay whole until the last micro-batch."""
    return request.accumulate > 1 and method.level != "sharded"


def _shards_of_gradients(method: Method, ranks: Ranks) -> CategoryBytes:
    """FSDP2's, of what is not sketched."""
    element, dense = own_element(method), {p.name for p in dense_of(method)}
    return _sum(ranks[0], lambda shard: element * shard.stored * (shard.parameter.name in dense))


def _in_backward(request: Request, method: Method) -> int:
    """What is stepped together: a parameter, or a unit's shards; of sketched ones what stays."""
    if method.level != DENSE:
        return own_element(method) * numel_of(dense_of(method))
    if method.backend.sharding != "rows":
        return own_element(method) * largest_of(method.trained)
    shards = shards_by_rank(method.trained, "rows", request.shards)[0]
    units: dict[int, int] = {}
    for shard in shards:
        layer = shard.parameter.layer
        units[layer] = units.get(layer, 0) + shard.stored
    return own_element(method) * max(units.values(), default=0)


def _whole(method: Method, dense: frozenset[str], element: int) -> CategoryBytes:
    return _category(
        [(p.kind in TABLES, element * p.numel * (p.name in dense)) for p in method.trained]
    )


def _whole_bytes(element: int, dense: frozenset[str], shard: Shard) -> int:
    """A parameter of which a piece is in the part has a whole gradient there."""
    return element * shard.parameter.numel * (shard.parameter.name in dense)


# ---- accumulators


def _accumulators(request: Request, method: Method) -> CategoryBytes:
    if method.level == DENSE:
        return CategoryBytes(total=0)
    sharding: Sharding = method.backend.sharding if method.level == "sharded" else "whole"

    def both(shard: Shard) -> int:
        return kept_bytes(shard, method) + FP32 * _matrix(shard, method)

    return _sum(shards_by_rank(method.trained, sharding, request.shards)[0], both)


def _matrix(shard: Shard, method: Method) -> int:
    """Numbers of A, of the coming step and the last."""
    geometry = method.sketch_of(shard.parameter)
    if geometry is None or geometry.rank is None:
        return 0
    return 2 * geometry.num_matrices * geometry.rank * geometry.block


# ---- activations


def _activations(request: Request, method: Method) -> tuple[int, int]:
    """At their most, and while the head is in backward."""
    # bfloat16 under DDP is autocast; the other backends have the weights themselves in it.
    autocast = method.backend.name == "ddp" and method.precision == "bfloat16"
    batch = replace(request.batch, element=method.element, autocast=autocast)
    adapters = batch.tokens * _adapter_numbers(method) * method.element
    model, fused = request.model, _fused(method)
    return (
        activation_bytes(model, batch, fused) + adapters,
        head_activation_bytes(model, batch, fused) + adapters,
    )


def _fused(method: Method) -> tuple[int, int] | None:
    if method.level != "fused":
        return None
    assert isinstance(method.sketch.block, int)
    assert isinstance(method.sketch.rank, int)
    return method.sketch.rank, method.sketch.block


def _adapter_numbers(method: Method) -> int:
    """X A^T of a token, at all adapters."""
    return method.adapter_rank * sum(p.kind == "matrix" for p in method.frozen)
