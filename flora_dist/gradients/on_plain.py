# SPDX-License-Identifier: Apache-2.0
"""One process, and tensor parallelism alone: gradients arrive at the parameters themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.tensor import DTensor

from flora_dist.core.layouts.dtensor import tiles_at
from flora_dist.core.layouts.replicated import whole
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.gradients.flow import Adapter, Source
from flora_dist.gradients.route import Route


def adapter_of_plain(slots: Sequence[Trainable]) -> Adapter:
    """Parameters whose ``.grad`` is complete after backward, whole or as this rank's shard."""
    return Adapter(sources=[source_at_parameter(slot) for slot in slots])


def source_at_parameter(slot: Trainable) -> Source:
    """Nothing is left to average: the framework has done it, or there is only one rank."""
    tensor = slot.tensor
    is_sharded = isinstance(tensor, DTensor)
    tiles = tiles_at(tensor) if isinstance(tensor, DTensor) else whole(tuple(tensor.shape))
    return Source(
        tensor=tensor,
        visible=tensor,
        tiles=tiles,
        route=Route(kept=(tiles,)),
        is_partial=is_sharded,
    )
