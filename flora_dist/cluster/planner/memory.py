# SPDX-License-Identifier: Apache-2.0
"""Bytes that the fullest rank holds, category by category.

weights       parameters at rest between steps, with the fp32 masters that ZeRO steps. FSDP2: fp32
              shards, each row count rounded up to the ranks. DDP: fp32 (bfloat16 is autocast).
              bfloat16-pure: the same in bfloat16, and no masters.
              ZeRO 0: the model, fp32 copies where it is in bfloat16. ZeRO 1, 2: the model's padded
              line, and fp32 masters of one part. ZeRO 3: a chunk of each parameter and its fp32
              master; parameters below 100,000 elements whole besides.
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
temporary     not exact: the most of what comes and goes beside all these. FSDP2: the gathered root
              and a layer, the largest unit's gradient and its fp32 buffer. ZeRO 1, 2: the bucket
              (two with overlap_comm), a flat copy of what is reduced from it, and a micro-batch's
              gradients beside their sum; or in the step the flat copy of the part's gradients, or
              fp64 of the largest for its norm. ZeRO 0: a flat copy likewise. ZeRO 3: that, and
              gathered weights. DDP: the largest gradient. All: instead, the gradient of the logits
              (in chunks, of one, and the head's gradient, made beside it); or a sketched gradient
              in low precision and the fp32 copy of a piece of it.

The total is all of them at once: gradients grow while activations go, so a real peak is lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flora_dist.cluster.planner.activations import activation_bytes, logits_gradient_bytes
from flora_dist.cluster.planner.methods import FP32, Method
from flora_dist.cluster.planner.model import ROOT, TABLES, Parameter
from flora_dist.cluster.planner.request import DENSE, Request, Sharding
from flora_dist.cluster.planner.shards import Shard, line_length, shards_by_rank
from flora_dist.cluster.planner.wire import kept_bytes

PERSISTENT = 100_000
"""Elements below which ZeRO-3 keeps a parameter whole: stage3_param_persistence_threshold."""
PIECE = 1 << 25
"""Elements of a gradient that are sketched at once on a GPU: core/step/views.py."""
MAX_LIVE = 1_000_000_000
"""Elements that ZeRO-3 gathers at most: stage3_max_live_parameters."""
FP64 = 8
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
    """Bytes by category."""
    ranks = shards_by_rank(method.trained, method.backend.sharding, request.shards)
    return {
        "weights": _weights(request, method, ranks),
        "gradients": _gradients(request, method, ranks),
        "accumulators": _accumulators(request, method),
        "state": _most(_sum(shards, method.state) for shards in ranks),
        "activations": CategoryBytes(total=_activations(request, method)),
        "temporary": CategoryBytes(total=_temporary(request, method)),
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
    whole = element * shard.parameter.numel if shard.parameter.numel < PERSISTENT else 0
    return (element + masters) * shard.stored + whole


# ---- gradients


def _gradients(request: Request, method: Method, ranks: Ranks) -> CategoryBytes:
    backend, element = method.backend, method.element
    if method.in_backward:
        return CategoryBytes(total=_in_backward(request, method))
    dense = frozenset(p.name for p in method.trained if method.sketch_of(p) is None)
    unsynchronised = request.accumulate > 1 and method.level != "sharded"
    bucket = element * _bucket(request, method)
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
        element = _own_element(method)
    if backend.sharding == "whole":
        return _whole(method, dense, element)
    return _sum(ranks[0], lambda shard: element * shard.stored * (shard.parameter.name in dense))


def _in_backward(request: Request, method: Method) -> int:
    """What is stepped together: a parameter, or a unit's shards; of sketched ones what stays."""
    if method.level != DENSE:
        return _own_element(method) * _numel(_dense(method))
    if method.backend.sharding != "rows":
        return _own_element(method) * _largest(method.trained)
    shards = shards_by_rank(method.trained, "rows", request.shards)[0]
    units: dict[int, int] = {}
    for shard in shards:
        layer = shard.parameter.layer
        units[layer] = units.get(layer, 0) + shard.stored
    return _own_element(method) * max(units.values(), default=0)


def _own_element(method: Method) -> int:
    """Bytes of a number of torch's own gradients: as of the weight."""
    return method.element if method.is_pure else FP32


def _whole(method: Method, dense: frozenset[str], element: int) -> CategoryBytes:
    return _category(
        [(p.kind in TABLES, element * p.numel * (p.name in dense)) for p in method.trained]
    )


def _whole_bytes(element: int, dense: frozenset[str], shard: Shard) -> int:
    """A parameter of which a piece is in the part has a whole gradient there."""
    return element * shard.parameter.numel * (shard.parameter.name in dense)


def _bucket(request: Request, method: Method) -> int:
    """Elements of ZeRO's reduction buffer."""
    if method.level == DENSE:
        return request.bucket
    return min(request.bucket, max(1, _numel(_dense(method))))


def _dense(method: Method) -> list[Parameter]:
    """Parameters whose gradients are not sketched."""
    return [p for p in method.trained if method.sketch_of(p) is None]


def _numel(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel for parameter in parameters)


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


def _activations(request: Request, method: Method) -> int:
    # bfloat16 under DDP is autocast; the other backends have the weights themselves in it.
    autocast = method.backend.name == "ddp" and method.precision == "bfloat16"
    batch = replace(request.batch, element=method.element, autocast=autocast)
    adapters = batch.tokens * _adapter_numbers(method) * method.element
    return activation_bytes(request.model, batch, _fused(method)) + adapters


def _fused(method: Method) -> tuple[int, int] | None:
    if method.level != "fused":
        return None
    assert isinstance(method.sketch.block, int)
    assert isinstance(method.sketch.rank, int)
    return method.sketch.rank, method.sketch.block


def _adapter_numbers(method: Method) -> int:
    """X A^T of a token, at all adapters."""
    return method.adapter_rank * sum(p.kind == "matrix" for p in method.frozen)


# ---- temporary


def _temporary(request: Request, method: Method) -> int:
    logits = logits_gradient_bytes(request.model, request.batch)
    found = _TEMPORARY[method.backend.sharding](request, method, logits)
    if method.level == DENSE or method.element == FP32:
        return found
    largest = _largest(method.trained)
    return max(found, method.element * largest + FP32 * min(largest, PIECE))


def _of_replicas(request: Request, method: Method, logits: int) -> int:
    if method.backend.stage is None:
        return max(logits, _own_element(method) * _largest(method.trained))
    return method.element * _flat_copy(request, method) + max(
        logits, FP32 * _largest(method.trained)
    )


def _of_units(request: Request, method: Method, logits: int) -> int:
    del request
    element, every = method.element, _units((*method.trained, *method.frozen))
    root = every.pop(ROOT, 0)
    is_reduced = method.level == "sharded"
    reduced = [p for p in method.trained if is_reduced or method.sketch_of(p) is None]
    gradient, buffer = (max(_units(p).values(), default=0) for p in (method.trained, reduced))
    gathered = element * (root + max(every.values(), default=0))
    return gathered + max(logits, element * gradient + FP32 * buffer)


def _of_line(request: Request, method: Method, logits: int) -> int:
    element, largest = method.element, _largest(method.trained)
    part = line_length(method.trained, request.shards) // request.shards
    widest = largest
    if method.level != DENSE:
        part = min(part, _numel(_dense(method)))
        widest = _largest(_dense(method))
    again = part + widest if request.accumulate > 1 else 0
    backward = _bucket(request, method) + _flat_copy(request, method) + again
    master = element if method.is_pure else FP32
    return max(element * backward + max(logits, element * largest), master * part, FP64 * widest)


def _flat_copy(request: Request, method: Method) -> int:
    """Elements that DeepSpeed copies together to reduce them, a bucket at most."""
    return min(_numel(_dense(method)), request.bucket)


def _of_chunks(request: Request, method: Method, logits: int) -> int:
    element, largest = method.element, _largest(method.trained)
    numel = sum(parameter.numel for parameter in (*method.trained, *method.frozen))
    gathered = min(numel, MAX_LIVE) + _flat_copy(request, method)
    return element * gathered + max(logits, element * largest)


def _largest(parameters: Iterable[Parameter]) -> int:
    return max((parameter.numel for parameter in parameters), default=0)


def _units(parameters: Iterable[Parameter]) -> dict[int, int]:
    """Elements by FSDP2's unit: a layer, or the root."""
    sizes: dict[int, int] = {}
    for parameter in parameters:
        sizes[parameter.layer] = sizes.get(parameter.layer, 0) + parameter.numel
    return sizes


_TEMPORARY = {"whole": _of_replicas, "rows": _of_units, "line": _of_line, "each": _of_chunks}
