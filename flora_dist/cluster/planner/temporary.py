# SPDX-License-Identifier: Apache-2.0
"""An estimate: the most bytes that come and go beside what a rank holds in the other categories.

In backward, by how the framework holds a model:

    FSDP2    the gathered root and a layer, the largest unit's gradient and its fp32 buffer; where
             shards rest in the host's memory, those of a unit as they come
    ZeRO 0   a flat copy of what is reduced, and the largest gradient
    ZeRO 1, 2  the bucket (two with overlap_comm), a flat copy of what is reduced from it, and a
             micro-batch's gradients beside their sum
    ZeRO 3   gathered weights, and a flat copy likewise or, in forward, what is prefetched: a bucket
             is copied out of the buffer in which it came; on CPUs the next comes at the same time,
             into a flat copy of gloo's
    DDP      the largest gradient; on one rank a micro-batch's beside the sum of several
    all      instead of a gradient, those of the logits; or a sketched gradient in low precision and
             the fp32 copy of a piece of it

In the step, when activations are gone: under ZeRO the flat copy of the part's gradients, or fp64 of
the largest for its norm; on CPUs what gloo gathers at once of ZeRO 1 and 2's weights, into a flat
copy of its own: the model, or with Flora a bucket (frameworks/deepspeed/gather.py). torch's AdamW
on CPUs: the root of a tensor's second moments, and a quotient.
"""

from __future__ import annotations

from collections.abc import Iterable

from flora_dist.cluster.planner.activations import logits_gradient_bytes
from flora_dist.cluster.planner.methods import FP32, Method, adamw_state
from flora_dist.cluster.planner.model import ROOT, Parameter
from flora_dist.cluster.planner.request import DENSE, Request
from flora_dist.cluster.planner.shards import ALIGNMENT, line_length, shards_by_rank

PIECES = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Device -> elements of a gradient that are sketched at once: core/step/views.py."""
MAX_LIVE = 1_000_000_000
"""Elements that ZeRO-3 gathers at most: stage3_max_live_parameters."""
PREFETCH = 50_000_000
"""Elements that ZeRO-3 gathers ahead at a time: stage3_prefetch_bucket_size."""
SUB_GROUP = 1_000_000_000
"""Elements of a rank that ZeRO-3 steps at once: sub_group_size."""
FP64 = 8


def temporary_bytes(
    request: Request, method: Method, *, gradients: int, kept: int, at_head: int
) -> int:
    """Bytes beyond all that the other categories have at their most.

    Args:
        request: the question.
        method: one of its methods.
        gradients: bytes of gradients at their most.
        kept: bytes of activations at their most.
        at_head: of them, while the head is in backward.
    """
    logits = max(0, logits_gradient_bytes(request.model, request.batch) - (kept - at_head))
    in_step = _in_step(request, method, gradients) - kept
    if _is_fresh(request, method):
        return max(0, logits - gradients, in_step)
    backward = _BACKWARD[method.backend.sharding](request, method, logits)
    if method.level != DENSE and method.element != FP32:
        largest = largest_of(method.trained)
        piece = min(largest, PIECES[request.device])
        backward = max(backward, method.element * largest + FP32 * piece)
    return max(backward, in_step)


def _is_fresh(request: Request, method: Method) -> bool:
    """Each gradient is kept as autograd made it, and none was there before the logits'."""
    is_torchs = method.backend.stage is None and method.backend.sharding == "whole"
    return is_torchs and request.ranks == 1 and method.level == DENSE and request.accumulate == 1


def _of_replicas(request: Request, method: Method, logits: int) -> int:
    if method.backend.stage is None:
        return max(logits, own_element(method) * largest_of(method.trained))
    return method.element * _flat_copy(request, method) + max(
        logits, FP32 * largest_of(method.trained)
    )


def _of_units(request: Request, method: Method, logits: int) -> int:
    element, every = method.element, _units((*method.trained, *method.frozen))
    root = every.pop(ROOT, 0)
    is_reduced = method.level == "sharded"
    reduced = [p for p in method.trained if is_reduced or method.sketch_of(p) is None]
    gradient, buffer = (max(_units(p).values(), default=0) for p in (method.trained, reduced))
    gathered = element * (root + max(every.values(), default=0))
    if is_offloaded(request, method):
        gathered += own_element(method) * max(root, *every.values()) // request.shards
    return gathered + max(logits, element * gradient + FP32 * buffer)


def _of_line(request: Request, method: Method, logits: int) -> int:
    part, widest = _part(request, method)
    again = part + widest if request.accumulate > 1 else 0
    backward = bucket_elements(request, method) + _flat_copy(request, method) + again
    element = method.element
    return element * backward + max(logits, element * largest_of(method.trained))


def _of_chunks(request: Request, method: Method, logits: int) -> int:
    element, largest = method.element, largest_of(method.trained)
    numel = numel_of((*method.trained, *method.frozen))
    reducing = element * _flat_copy(request, method) + max(logits, element * largest)
    return element * min(numel, MAX_LIVE) + max(reducing, element * _prefetched(request, method))


def _prefetched(request: Request, method: Method) -> int:
    """Elements of the buffers in which ZeRO-3's weights come, beside the weights themselves.

    The first module's are gathered alone, the others a bucket at a time: that of a bucket stays
    until the last module has it, and the next bucket is asked for at once.
    """
    if request.shards == 1:
        return 0
    ahead = numel_of((*method.trained, *method.frozen)) - request.model.parameters[0].numel
    bucket = min(ahead, PREFETCH)
    return bucket + (min(ahead - bucket, PREFETCH) if request.device == "cpu" else 0)


_BACKWARD = {"whole": _of_replicas, "rows": _of_units, "line": _of_line, "each": _of_chunks}


def _in_step(request: Request, method: Method, gradients: int) -> int:
    sharding, is_adamw = method.backend.sharding, _is_adamw_on_cpu(request, method)
    if sharding == "each":
        return _in_step_of_chunks(request, method)
    if sharding != "line":
        shards = shards_by_rank(method.trained, sharding, request.shards)[0]
        largest = max((shard.stored for shard in shards), default=0)
        return 2 * FP32 * largest if is_adamw else 0
    part, widest = _part(request, method)
    master = own_element(method)
    gathered = 0
    if request.device == "cpu" and request.shards > 1:
        gathered = method.element * _gathered_at_once(request, method)
    if is_adamw:  # of the part at once; its gradients are the flat copy by then
        return max(master * part + 2 * FP32 * part - gradients, gathered)
    return max(master * part, FP64 * widest, gathered)


def _is_adamw_on_cpu(request: Request, method: Method) -> bool:
    return request.device == "cpu" and method.state is adamw_state


def _in_step_of_chunks(request: Request, method: Method) -> int:
    """A sub-group's dense gradients, flat and then as its masters are; its buffer stays besides."""
    element, master, dense = method.element, own_element(method), tuple(dense_of(method))
    shards = shards_by_rank(dense, "each", request.shards)[0]
    part = min(sum(shard.stored for shard in shards), SUB_GROUP)
    again = 2 * FP32 if _is_adamw_on_cpu(request, method) else 0
    made = element if element != master else 0
    widest = max((shard.stored for shard in shards), default=0)
    return max((master + max(made, again)) * part, FP64 * widest)


def _gathered_at_once(request: Request, method: Method) -> int:
    """Elements of the largest piece in which gloo gathers stepped weights of all ranks.

    Pieces are as many as buckets fit; the last has what is left (DeepSpeed's all_gather_dp_groups).
    """
    line = line_length(method.trained, request.shards)
    if method.flora is None:
        return line
    part, pieces = line // request.shards, max(1, line // request.bucket)
    piece = part // pieces // ALIGNMENT * ALIGNMENT
    return request.shards * (part - (pieces - 1) * piece)


def _part(request: Request, method: Method) -> tuple[int, int]:
    """Elements of a rank's part of ZeRO's line of dense gradients, and of the largest of these."""
    part = line_length(method.trained, request.shards) // request.shards
    if method.level == DENSE:
        return part, largest_of(method.trained)
    dense = dense_of(method)
    return min(part, numel_of(dense)), largest_of(dense)


def _flat_copy(request: Request, method: Method) -> int:
    """Elements that DeepSpeed copies together to reduce them, a bucket at most."""
    return min(numel_of(dense_of(method)), request.bucket)


def _units(parameters: Iterable[Parameter]) -> dict[int, int]:
    """Elements by FSDP2's unit: a layer, or the root."""
    sizes: dict[int, int] = {}
    for parameter in parameters:
        sizes[parameter.layer] = sizes.get(parameter.layer, 0) + parameter.numel
    return sizes


# ---- also for memory.py


def is_offloaded(request: Request, method: Method) -> bool:
    """Whether shards rest in the host's memory; what FSDP2 does not hold stays on the GPU."""
    return request.cpu_offload and method.backend.sharding == "rows"


def own_element(method: Method) -> int:
    """Bytes of a number of torch's own gradients: as of the weight."""
    return method.element if method.is_pure else FP32


def bucket_elements(request: Request, method: Method) -> int:
    """Elements of ZeRO's reduction buffer."""
    if method.level == DENSE:
        return request.bucket
    return min(request.bucket, max(1, numel_of(dense_of(method))))


def dense_of(method: Method) -> list[Parameter]:
    """Parameters whose gradients are not sketched."""
    return [p for p in method.trained if method.sketch_of(p) is None]


def numel_of(parameters: Iterable[Parameter]) -> int:
    """Elements of all of them."""
    return sum(parameter.numel for parameter in parameters)


def largest_of(parameters: Iterable[Parameter]) -> int:
    """Elements of the largest."""
    return max((parameter.numel for parameter in parameters), default=0)
