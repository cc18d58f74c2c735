# SPDX-License-Identifier: Apache-2.0
"""One fault per mechanism; each must make the battery fail, or the battery proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.comm import groups
from flora_dist.core.sketch import keys, quantise
from flora_dist.core.step import elements, matrix, momentum_rules, normalise, plan
from flora_dist.core.step.basis import BatchSketches, SketchedBasis
from flora_dist.core.step.cut_rows import CutRows
from flora_dist.frameworks import fsdp1


def _unsummed(*names: str) -> Callable[[Any], Callable[..., Any]]:
    """Terms of these names keep this rank's own values."""

    def mutate(original: Any) -> Callable[..., Any]:
        def summing(terms: Any, message: Any) -> Callable[[], None]:
            sum_ = original(terms, message)
            values = [own[name] for own in terms for name in names if name in own]

            def some() -> None:
                before = [value.clone() for value in values]
                sum_()
                for value, kept in zip(values, before, strict=True):
                    value.copy_(kept)

            return some

        return summing

    return mutate


def _never_moved(original: Any) -> Callable[..., Any]:
    return lambda *given, **more: replace(original(*given, **more), scale=None)


def _key_of_this_rank(original: Any) -> Callable[..., int]:
    def derive_key(**parts: Any) -> int:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return int(original(**parts)) + rank + 1

    return derive_key


MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "column sums": (plan, "summing", _unsummed("columns")),
    "rms sums": (plan, "summing", _unsummed("squares", "cross", "history", "update")),
    "window change": (BatchSketches, "change", _never_moved),
    "keys": (keys, "derive_key", _key_of_this_rank),
}
"""Name -> (where, attribute, from the right one to the wrong one)."""

WEIGHT_MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "what rows weigh": (plan, "summing", _unsummed("row_weights")),
}
"""That of matrices whose rows and columns weigh each other."""

COLUMN_MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "rows of columns": (plan, "summing", _unsummed("rows")),
    "blocks of columns": (plan, "summing", _unsummed("blocks")),
}
"""Those of sharded columns."""


def _without_peers(original: Any) -> Callable[..., None]:
    del original
    return lambda *_: None


def _one_column_off(original: Any) -> Callable[..., None]:
    def exchange_rows_(terms: Any, message: Any) -> None:
        for own in terms:
            if "elements" in own:
                own["elements"] = own["elements"].roll(1, 2)
        original(terms, message)

    return exchange_rows_


def _but_the_last_peer(original: Any) -> Callable[..., Tensor]:
    def exchange(self: Any, sent_S: Tensor, sizes: Any) -> Tensor:
        received_S: Tensor = original(self, sent_S, sizes)
        if sizes:
            received_S[-sizes[max(sizes)] :] = 0
        return received_S

    return exchange


def _of_zeros(original: Any) -> Callable[..., Tensor]:
    return lambda *given: torch.zeros_like(original(*given))


SPAN_MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "rows of spans": (plan, "exchange_rows_", _without_peers),
    "blocks of spans": (CutRows, "_blocks", _of_zeros),
}
"""Those of spans, of which few ranks share a row."""

LINE_MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "place in a row": (plan, "exchange_rows_", _one_column_off),
    "one sharer": (groups.GroupReducer, "exchange", _but_the_last_peer),
    "rows of two spans": (plan, "summing", _unsummed("elements", "products")),
}
"""More of what travels of a row; the last one where two ranks share all of them."""


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


def _the_gradient_alone(original: Any) -> Callable[..., Any]:
    def advance(self: Any, x: Any, *given: Any) -> tuple[Tensor, Tensor]:
        gradient = x.elements_ENW.clone()
        return gradient, original(self, x, *given)[1]

    return advance


def _as_it_was(original: Any) -> Callable[..., Tensor]:
    del original
    return lambda self, second: second  # noqa: ARG005 - the method's signature


def _norms_without_bound(original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def growth_factor(square_sum_H: Tensor, last_H: Tensor, growth: float) -> Any:
        return original(square_sum_H, last_H, growth)[0], square_sum_H.sqrt()

    return growth_factor


def _of_twice_the_side(original: Any) -> Callable[..., Tensor]:
    return lambda update_ENW, side: original(update_ENW, 2 * side)


def _of_ones(original: Any) -> Callable[..., Tensor]:
    return lambda *given: torch.ones_like(original(*given))


def _all_alike(original: Any) -> Callable[..., None]:
    del original
    return lambda *_: None


RULE_MUTATIONS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "ademamix": (momentum_rules.AdEMAMixRule, "advance", _the_gradient_alone),
    "subspace_adam": (SketchedBasis, "spread", _as_it_was),
    "apollo": (momentum_rules.ApolloRule, "advance", _the_gradient_alone),
    "growth": (matrix, "growth_factor", _norms_without_bound),
    "orthogonalise": (matrix, "orthogonalised", _of_twice_the_side),
    "normalise": (normalise, "column_scale", _of_ones),
    "racs": (matrix, "column_weights", _all_alike),
}
"""What each rule and setting that torch's operators alone know has of its own."""


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Break one mechanism; none for the empty name."""
    if not name:
        yield
        return
    everything = {**MUTATIONS, **COLUMN_MUTATIONS, **SPAN_MUTATIONS, **LINE_MUTATIONS}
    everything |= {**FSDP1_MUTATIONS, **RECORD_MUTATIONS, **RULE_MUTATIONS, **WEIGHT_MUTATIONS}
    home, attribute, mutate = everything[name]
    original = getattr(home, attribute)
    setattr(home, attribute, mutate(original))
    try:
        yield
    finally:
        setattr(home, attribute, original)
