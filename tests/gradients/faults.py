# SPDX-License-Identifier: Apache-2.0
"""One fault per mechanism of sketched gradients; each must make the tests fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from flora_dist import flora
from flora_dist.core.parameters import norms
from flora_dist.core.sketch.keys import Purpose
from flora_dist.core.step.basis import Sketches
from flora_dist.gradients import average as routes
from flora_dist.gradients import cycle as gradients
from flora_dist.gradients.accumulator import Accumulator
from flora_dist.gradients.average_records import RecordBuckets
from flora_dist.gradients.cut_sketches import PartialSketches
from flora_dist.gradients.pipeline import Pipeline
from flora_dist.kernels import records as few_bits
from tests.battery.mutations import RECORD_MUTATIONS

Mutate = Callable[[Any], Any]


def _undivided(original: Any) -> Any:
    def averaging(accumulators: Any, routes: Any, **more: Any) -> Any:
        return original(accumulators, [replace(r, divisor=1.0) for r in routes], **more)

    return averaging


def _without_replicas(original: Any) -> Any:
    def averaging(accumulators: Any, routes: Any, **more: Any) -> Any:
        alone = [r if r.scatter is None else replace(r, sums=()) for r in routes]
        return original(accumulators, alone, **more)

    return averaging


def _last_only(original: Any) -> Any:
    def add_(self: Accumulator, gradient: Tensor) -> None:
        self.drop()
        original(self, gradient)

    return add_


def _one_basis_for_all_steps(original: Any) -> Any:
    def at(self: Any, window: int, *where: Any) -> Tensor:
        is_gradient = self._purpose == Purpose.GRADIENT
        return original(self, 1 if is_gradient else window, *where)

    return at


def _momentum_basis(original: Any) -> Any:
    def matrix(self: Any, *arguments: Any) -> Tensor:
        self._purpose = Purpose.MOMENTUM
        return original(self, *arguments)

    return matrix


def _incomplete(original: Any) -> Any:
    del original
    return lambda self, means: None  # noqa: ARG005 - the method's signature


def _every_block(original: Any) -> Any:
    """Count blocks that two ranks keep twice."""
    del original

    def square_sum(slot: Any, gradient: Any) -> Tensor:
        del slot
        return sum(tile.square().sum() for tile in gradient.tiles) + 0 * gradient.sketch_ERB.sum()

    return square_sum


def _wrong_place(original: Any) -> Any:
    def reduce_scatter(lines_WS: Tensor, group: Any) -> Tensor:
        return original(lines_WS.flip(0).contiguous(), group)

    return reduce_scatter


def _unscaled(original: Any) -> Any:
    del original
    return lambda gradients, factor: None  # noqa: ARG005 - the function's signature


def _one_key(original: Any) -> Any:
    def rounding_key(self: Any, purpose: Any, window: int, number: int = 0) -> int:
        del window, number
        return original(self, purpose, 1, 0)

    return rounding_key


def _first_rank_twice(original: Any) -> Any:
    def round_(self: Any, pieces: Any, lines: Any, steps: Any) -> Any:
        return original(self, pieces, [lines[0], *lines[:-1]], steps)

    return round_


def _half_a_scale(original: Any) -> Any:
    def level_records(x_R: Tensor, code: Any) -> Tensor:
        records = original(x_R, code)
        records[..., -2] ^= 0x40  # a bit of the scale's mantissa
        return records

    return level_records


def _always_levels(original: Any) -> Any:
    """Put sums at levels again and again."""

    def rounded(numbers_R: Tensor, code: Any, draws: Any) -> Tensor:
        del draws
        return original(numbers_R, code, None)

    return rounded


def _one_too_early(original: Any) -> Any:
    def arrived(self: Pipeline, index: int) -> None:
        missing = self._missing[self._num_sent]
        if len(missing) > 1:
            missing.discard(next(other for other in missing if other != index))
        original(self, index)

    return arrived


FAULTS: dict[str, tuple[Any, str, Mutate]] = {
    "divisor": (gradients, "Averaging", _undivided),
    "replicas": (gradients, "Averaging", _without_replicas),
    "micro-batches": (Accumulator, "add_", _last_only),
    "fresh basis": (Sketches, "at", _one_basis_for_all_steps),
    "basis of its own": (Sketches, "_keys", _momentum_basis),
    "cut blocks": (PartialSketches, "complete_", _incomplete),
    "whose line": (routes, "reduce_scatter", _wrong_place),
    "rounding key": (Sketches, "rounding_key", _one_key),
    "owner's sum": (RecordBuckets, "_round", _first_rank_twice),
    "scale": (few_bits, "level_records", _half_a_scale),
    "packing order": RECORD_MUTATIONS["packing order"],
    "levels of sums": (few_bits, "_rounded", _always_levels),
    "one gradient too early": (Pipeline, "arrived", _one_too_early),
    "clipping": (flora, "scale_", _unscaled),
    "blocks kept twice": (norms, "_square_sum_of_sketches", _every_block),
}
"""Name -> (where, attribute, from the right one to the wrong one)."""


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Put one fault in; none for the empty name."""
    if not name:
        yield
        return
    home, attribute, mutate = FAULTS[name]
    original = getattr(home, attribute)
    setattr(home, attribute, mutate(original))
    try:
        yield
    finally:
        setattr(home, attribute, original)
