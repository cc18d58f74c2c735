# SPDX-License-Identifier: Apache-2.0
"""ZeRO 1 and 2 over gloo: stepped weights are gathered ``allgather_bucket_size`` at a time.

DeepSpeed 0.19 follows that setting only where torch has no ``all_gather_into_tensor``. Elsewhere it
gathers all weights of a group at once, for which gloo makes a flat copy of its own: the model once
more. An engine whose ranks talk over gloo is therefore told, while it steps, that there is no such
collective. It then takes DeepSpeed's other way, which moves the same bits to the same places. NCCL
gathers in place and keeps its one call. Private names of 0.19.8.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed import comm
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from flora_dist.frameworks.deepspeed.config import TESTED

_PARTS: dict[type, str] = {
    DeepSpeedZeroOptimizer: "parallel_partitioned_bit16_groups",
    BF16_Optimizer: "bf16_partitioned_groups",
}
"""Optimizer -> its weights: of each group every rank's part."""
_SHARED = (
    *("allgather_bucket_size", "nccl_start_alignment_factor", "overflow"),
    *("real_dp_process_group", "step", "update_lp_params"),
)


def gathering_in_pieces(optimizer: Any) -> Callable[[], None]:
    """What lets an engine's optimizer gather weights piece by piece where its backend copies them.

    It does nothing for NCCL, for one rank, and for optimizers that gather otherwise (stages 0 and
    3). Warns where this DeepSpeed gathers in another way than the one that was read.

    Raises:
        ValueError: pieces of ``allgather_bucket_size`` would have no elements of some rank.
    """
    parts = _PARTS.get(type(optimizer))
    if parts is None or dist.get_world_size() == 1 or "gloo" not in str(dist.get_backend_config()):
        return _as_ever
    has_names = all(hasattr(optimizer, name) for name in (parts, *_SHARED))
    if not (has_names and hasattr(comm, "has_all_gather_into_tensor")):
        warnings.warn(_another_version(), stacklevel=2)
        return _as_ever
    groups = zip(getattr(optimizer, parts), optimizer.real_dp_process_group, strict=True)
    ranks = max(len(own) if _copies(group, own[0]) else 1 for own, group in groups)
    if ranks == 1:
        return _as_ever
    _check_size(optimizer, ranks)

    def begin() -> None:
        _let_threads_hide_the_one_call()
        pieces = _Pieces()
        optimizer.step = pieces.during(optimizer.step, optimizer)
        optimizer.update_lp_params = pieces.during(optimizer.update_lp_params, optimizer)

    return begin


def _as_ever() -> None:
    pass


def _copies(group: dist.ProcessGroup, weights: Tensor) -> bool:
    return f"{weights.device.type}:gloo" in str(dist.get_backend_config(group))


def _check_size(optimizer: Any, ranks: int) -> None:
    least = ranks * int(optimizer.nccl_start_alignment_factor)
    size = int(optimizer.allgather_bucket_size)
    if size < least:
        raise ValueError(
            f"zero_optimization.allgather_bucket_size must be at least {least} where gloo gathers "
            f"weights over {ranks} ranks, so that a piece has elements of each; it is {size}. "
            "Raise it, or leave it out for 5e8."
        )


class _Pieces:
    """Tells DeepSpeed, while an engine steps, what makes it gather in pieces."""

    def __init__(self) -> None:
        self.is_asked = False
        self._has_warned = False

    def during(self, own: Callable[..., Any], optimizer: Any) -> Callable[..., Any]:
        """``own``, with gathers in pieces while it runs."""

        def in_pieces(*arguments: Any, **more: Any) -> Any:
            self.is_asked = False
            before, _here.pieces = getattr(_here, "pieces", None), self
            try:
                result = own(*arguments, **more)
            finally:
                _here.pieces = before
            if not (self.is_asked or self._has_warned or optimizer.overflow):
                self._has_warned = True
                warnings.warn(_another_version(), stacklevel=2)
            return result

        return in_pieces


_here = threading.local()
""".pieces: of the engine that steps in this thread. Other threads' engines gather as ever."""


@cache
def _let_threads_hide_the_one_call() -> None:
    own = comm.has_all_gather_into_tensor

    def has_all_gather_into_tensor() -> bool:
        pieces = getattr(_here, "pieces", None)
        if pieces is None:
            return bool(own())
        pieces.is_asked = True
        return False

    # What all_gather_dp_groups asks. Not the backend's own function, which all_gather_into_tensor
    # asks: it would then do nothing.
    comm.has_all_gather_into_tensor = has_all_gather_into_tensor


def _another_version() -> str:
    return (
        f"DeepSpeed {deepspeed.__version__} gathers weights in another way than {TESTED}: gloo "
        "copies all of them for it, which is a peak of the model's size in every step. Use "
        f"DeepSpeed {TESTED} where memory is short."
    )
