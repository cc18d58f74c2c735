# SPDX-License-Identifier: Apache-2.0
"""One fault per mechanism that sketched gradients need under DeepSpeed, and bodies that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from flora_dist.frameworks.deepspeed import gradients as deepspeed_gradients
from flora_dist.frameworks.deepspeed import steps as deepspeed_steps
from flora_dist.frameworks.deepspeed.steps import EngineSketches
from tests.gradients import faults
from tests.zero import engines, low_precision
from tests.zero.engines import Run
from tests.zero.small import batch, config_of, start

Patch = tuple[Any, str, Callable[[Any], Any]]


def _silent(original: Any) -> Any:
    """The sketches are averaged, and then counted as nothing."""

    def norm(self: EngineSketches) -> Tensor:
        return 0.0 * original(self)

    return norm


def _unscaled(original: Any) -> Any:
    del original

    def scale_(self: EngineSketches, factor: Any) -> None:
        del factor
        self._is_scaled = True

    return scale_


def _of_every_group(original: Any) -> Any:
    """Scaled again for each group that DeepSpeed scales."""

    def scale_(self: EngineSketches, factor: Any) -> None:
        self._is_scaled = False
        original(self, factor)

    return scale_


def _kept(original: Any) -> Any:
    del original
    return lambda self, optimizer: None  # noqa: ARG005 - the method's signature


def _nowhere(original: Any) -> Any:
    del original
    return lambda *_: None


def _ready(original: Any) -> Any:
    """As in a version of DeepSpeed that does not know ``ds_grad_is_ready``."""

    def pass_by(optimizer: Any, sources: Any) -> None:
        original(optimizer, sources)
        for source in sources:
            source.tensor.ds_grad_is_ready = True

    return pass_by


FAULTS: dict[str, Patch] = {
    **{name: faults.FAULTS[name] for name in ("divisor", "micro-batches", "whose line")},
    "blocks kept twice": faults.FAULTS["blocks kept twice"],
    "norm": (EngineSketches, "norm", _silent),
    "scale": (EngineSketches, "scale_", _unscaled),
    "scaled once": (EngineSketches, "scale_", _of_every_group),
    "forgotten": (EngineSketches, "end", _kept),
    "norm asked": (deepspeed_steps, "_join_norm", _nowhere),
    "scale asked": (deepspeed_steps, "_join_scale", _nowhere),
    "passed by": (deepspeed_gradients, "_pass_by", _ready),
}
"""Name -> (where, attribute, from the right one to the wrong one)."""


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Put one fault in."""
    home, attribute, mutate = FAULTS[name]
    original = getattr(home, attribute)
    setattr(home, attribute, mutate(original))
    try:
        yield
    finally:
        setattr(home, attribute, original)


def train(run: Run, fault: str) -> dict[str, Any]:
    """``engines.train`` with a fault in it."""
    with broken(fault):
        return engines.train(run)


def error(stage: int, fault: str) -> str:
    """What the first step says of a fault; empty if nothing."""
    with broken(fault):
        engine, _ = start(config_of(stage, flora={"gradients": "compressed"}))
        try:
            engine.backward(engine(batch(0)))
            engine.step()
        except RuntimeError as said:
            return str(said)
        finally:
            with suppress(Exception):  # buckets of an interrupted backward
                engine.destroy()
    return ""


def overflow(run: Run, fault: str) -> str:
    """What a fault leads to after a step that is skipped; empty if nothing."""
    with broken(fault):
        try:
            low_precision.overflow(run)
        except RuntimeError as said:
            return str(said)
    return ""
