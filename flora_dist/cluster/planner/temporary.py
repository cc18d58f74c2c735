# SPDX-License-Identifier: Apache-2.0
"""An estimate: the most bytes that come and go beside what a rank holds in the other categories.

In backward, by how the framework holds a model:

    FSDP2    the gathered root and a layer, the largest unit's gradient and its fp32 buffer; where
             shards rest in the host's memory, those of a unit as they come
    ZeRO 0   a flat copy of what is reduced, and the largest gradient
    ZeRO 1, 2  the bucket (two with overlap_comm), a flat copy of what is reduced from it, and a
             micro-batch's gradients beside their sum
    ZeRO 3   a flat copy likewise, and gathered weights
    DDP      the largest gradient; on one rank a micro-batch's beside the sum of several
    all      instead of a gradient, those of the logits; or a sketched gradient in low precision and
             the fp32 copy of a piece of it

In the step, when activations are gone: under ZeRO 1 and 2 the flat copy of the part's gradients, or
fp64 of the largest for its norm; on CPUs the model once more, since gloo gathers the weights into a
flat copy of its own. torch's AdamW on CPUs: the root of a tensor's second moments, and a quotient.
"""

from __future__ import annotations

from collections.abc import Iterable

from flora_dist.cluster.planner.activations import logits_gradient_bytes
from flora_dist.cluster.planner.methods import FP32, Method, adamw_state
from flora_dist.cluster.planner.model import ROOT, Parameter
from flora_dist.cluster.planner.request import DENSE, Request
from flora_dist.cluster.planner.shards import line_length, shards_by_rank

PIECES = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Device -> elements of a gradient that are sketched at once: core/step/views.py."""
MAX_LIVE = 1_000_000_000
"""Elements that ZeRO-3 gathers at most: stage3_max_live_parameters."""
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
    gathered = min(numel, MAX_LIVE) + _flat_copy(request, method)
    return element * gathered + max(logits, element * largest)


_BACKWARD = {"whole": _of_replicas, "rows": _of_units, "line": _of_line, "each": _of_chunks}


def _in_step(request: Request, method: Method, gradients: int) -> int:
    is_adamw = request.device == "cpu" and method.state is adamw_state
    if method.backend.sharding != "line":
        shards = shards_by_rank(method.trained, method.backend.sharding, request.shards)[0]
        largest = max((shard.stored for shard in shards), default=0)
        return 2 * FP32 * largest if is_adamw else 0
    part, widest = _part(request, method)
    master = method.element if method.is_pure else FP32
    gathered = 0
    if request.device == "cpu" and request.shards > 1:
        gathered = method.element * line_length(method.trained, request.shards)
    if is_adamw:  # of the part at once; its gradients are the flat copy by then
        return max(master * part + 2 * FP32 * part - gradients, gathered)
    return max(master * part, FP64 * widest, gathered)


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
