# SPDX-License-Identifier: Apache-2.0
"""One fault per mechanism; each must make the battery fail, or the battery proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from flora_dist.core.comm import groups
from flora_dist.core.sketch import keys, quantise
from flora_dist.core.step import elements, plan
from flora_dist.core.step.basis import BatchSketches
from flora_dist.frameworks import fsdp1


def _unsummed(*names: str) -> Callable[[Any], Callable[..., Any]]:
    """Terms of these names keep this rank's own values."""

    def mutate(original: Any) -> Callable[..., Any]:
        def sum_terms(terms: Any, message: Any) -> Any:
            totals = original(terms, message)
            for own, total in zip(terms, totals, strict=True):
                total.update({name: own[name] for name in names if name in own})
            return totals

        return sum_terms

    return mutate


def _never_moved(original: Any) -> Callable[..., Any]:
    return lambda *given, **more: replace(original(*given, **more), scale=None)


def _key_of_this_rank(original: Any) -> Callable[..., int]:
    def derive_key(**parts: Any) -> int:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return int(original(**parts)) + rank + 1

    return derive_key


MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "column sums": (plan, "sum_terms", _unsummed("columns")),
    "rms sums": (plan, "sum_terms", _unsummed("squares", "cross", "history", "update")),
    "cut rows": (plan, "sum_terms", _unsummed("rows")),
    "cut blocks": (plan, "sum_terms", _unsummed("blocks")),
    "window change": (BatchSketches, "change", _never_moved),
    "keys": (keys, "derive_key", _key_of_this_rank),
}
"""Name -> (where, attribute, from the right one to the wrong one)."""


def _without_padding(original: Any) -> Callable[..., Any]:
    del original

    def offsets(flat: Any) -> Iterator[int]:
        start = 0
        for shape in flat._shapes:
            yield start
            start += shape.numel()

    return offsets


def _over_the_world(original: Any) -> Callable[..., None]:
    def sum_(self: Any, message_S: Tensor) -> None:
        original(replace(self, group=dist.group.WORLD), message_S)

    return sum_


def _in_the_unit(original: Any) -> Callable[..., Any]:
    del original
    return lambda flat, walk: list(flat._fqns)  # noqa: ARG005 - the function's signature


FSDP1_MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "padding between parameters": (fsdp1, "_offsets", _without_padding),
    "sums within the shard group": (groups.GroupReducer, "sum_", _over_the_world),
    "names in the model": (fsdp1, "_names", _in_the_unit),
}
"""Those of FSDP1's map; its arithmetic has those above."""


def _another_key(original: Any) -> Callable[..., int]:
    return lambda **parts: int(original(**parts)) ^ 1


def _first_code_highest(original: Any) -> Callable[..., Tensor]:
    """Written so; read as ever."""

    def packed(codes_R: Tensor, bits: int) -> Tensor:
        groups = codes_R.view(*codes_R.shape[:-1], -1, 8 // bits)
        reversed_R: Tensor = original(groups.flip(-1).reshape(codes_R.shape), bits)
        return reversed_R

    return packed


def _half_a_scale(original: Any) -> Callable[..., Tensor]:
    def round_records(*given: Any) -> Tensor:
        records: Tensor = original(*given)
        records[..., -2] ^= 0x40  # a bit of the scale's mantissa
        return records

    return round_records


RECORD_MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "scale": (elements, "round_records", _half_a_scale),
    "rotation": (keys, "derive_key", _another_key),
    "rounding key": (elements, "derive_key", _another_key),
    "packing order": (quantise, "_packed", _first_code_highest),
}
"""Those of momenta in few bits."""


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Break one mechanism; none for the empty name."""
    if not name:
        yield
        return
    home, attribute, mutate = {**MUTATIONS, **FSDP1_MUTATIONS, **RECORD_MUTATIONS}[name]
    original = getattr(home, attribute)
    setattr(home, attribute, mutate(original))
    try:
        yield
    finally:
        setattr(home, attribute, original)
