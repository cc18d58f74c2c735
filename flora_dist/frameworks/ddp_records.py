# SPDX-License-Identifier: Apache-2.0
"""The gradients of a DDP bucket in few bits: records to their owners, means back, in its place.

The owner's mean is known only when all records have come, so this waits for its messages, where
numbers in full travel beside backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.comm.groups import all_reduce_, group_device
from flora_dist.core.layouts.replicated import whole
from flora_dist.core.sketch import ops
from flora_dist.core.step.batch import arithmetic_dtype
from flora_dist.core.step.gradient import Records
from flora_dist.frameworks.ddp_bucket import BucketParameter
from flora_dist.gradients.accumulator import Accumulator
from flora_dist.gradients.average import Averaging
from flora_dist.gradients.route import Route

Pair = tuple[BucketParameter, Tensor]
"""A parameter, and its gradient in the bucket."""


def fill_by_records(
    pairs: Iterable[Pair], group: dist.ProcessGroup, *, wire_bits: int, step: int, is_dense: bool
) -> None:
    """Overwrite gradients with what the mean of their sketches stands for; others with the mean.

    Args:
        pairs: of one bucket.
        group: whose mean is taken.
        wire_bits: of each number that travels.
        step: whose projections are drawn.
        is_dense: whether all travel as they are.
    """
    listed = list(pairs)
    sketched = [pair for pair in listed if pair[0].sketches is not None and not is_dense]
    kept = {id(gradient) for _, gradient in sketched}
    _average_(sketched, group, wire_bits, step)
    _average_in_full_([g for _, g in listed if id(g) not in kept], group)


def _average_(pairs: Sequence[Pair], group: dist.ProcessGroup, wire_bits: int, step: int) -> None:
    if not pairs:
        return
    accumulators = [_accumulator(known, gradient, group, step) for known, gradient in pairs]
    routes = [_route(known, group) for known, _ in pairs]
    means = Averaging(accumulators, routes, wire_dtype=None, wire_bits=wire_bits).run()
    for (known, gradient), accumulator, mean in zip(pairs, accumulators, means, strict=True):
        (records,) = mean.tiles
        assert isinstance(records, Records), known.name
        expanded_ENM = ops.expand(
            records[:, :, :],
            accumulator.sketch(gradient.device),
            num_columns=known.size.num_columns,
        )
        gradient.copy_(expanded_ENM.reshape(gradient.shape))


def _accumulator(
    known: BucketParameter, gradient: Tensor, group: dist.ProcessGroup, step: int
) -> Accumulator:
    """One micro-batch's sketch."""
    assert known.sketches is not None, known.name
    (tile,) = whole(known.size.shape)
    accumulator = Accumulator(
        name=known.name,
        geometry=known.size,
        tile=tile,
        sketches=known.sketches,
        dtype=arithmetic_dtype(gradient.dtype),
        device=gradient.device,
        next_step=lambda: step,
    )
    accumulator.replica = dist.get_rank(group)
    accumulator.add_(gradient)
    return accumulator


def _route(known: BucketParameter, group: dist.ProcessGroup) -> Route:
    ranks = dist.get_world_size(group)
    sums = (group,) if ranks > 1 else ()
    return Route(kept=(whole(known.size.shape),), sums=sums, divisor=ranks)


def _average_in_full_(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    if not gradients:
        return
    dtype = arithmetic_dtype(gradients[0].dtype)
    message_S = torch.cat([gradient.reshape(-1).to(dtype) for gradient in gradients])
    there_S = message_S.to(group_device(message_S, group))
    all_reduce_(there_S, group)
    mean_S = there_S.to(message_S.device) / dist.get_world_size(group)
    parts = torch.split(mean_S, [gradient.numel() for gradient in gradients])
    for gradient, numbers in zip(gradients, parts, strict=True):
        gradient.copy_(numbers.view(gradient.shape))
