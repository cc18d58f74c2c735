# SPDX-License-Identifier: Apache-2.0
"""Wrong maps of an engine's partitions, each of which ``attach`` must refuse."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

import flora_dist.deepspeed
from flora_dist import Flora
from flora_dist.core.layouts.flat import Span
from flora_dist.frameworks.deepspeed import attach as integration
from flora_dist.frameworks.deepspeed.config import prepared
from tests.zero.engines import Run, build, config_of
from tests.zero.small import by_host

Fault = Callable[[Any], AbstractContextManager[Any]]


def attach_with(stage: int, fault: str) -> str:
    """What ``attach`` says on this rank to an engine whose map has a fault; empty if nothing."""
    run = Run(stage=stage, zero={} if stage == 3 else {"round_robin_gradients": True})
    model = build()
    flora = Flora([p for p in model.parameters() if p.requires_grad], **run.case.flora)
    engine = by_host(model=model, optimizer=flora, config=prepared(config_of(run)))
    try:
        with FAULTS[fault](engine) if fault else nullcontext():
            flora_dist.deepspeed.attach(engine)
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def _each_span(function: str, change: Callable[[Span], Span]) -> AbstractContextManager[Any]:
    original = getattr(integration, function)

    def changed(shapes: Any, **where: Any) -> tuple[Span, ...]:
        return tuple(change(span) for span in original(shapes, **where))

    return patch.object(integration, function, changed)


def _shifted(span: Span) -> Span:
    return dataclasses.replace(span, offset=span.offset + 1)


def _moved_bounds(span: Span) -> Span:
    """The first rank's last element given to the next."""
    (start, stop), (_, end), *rest = span.owned
    if not start < stop - 1 < stop < end:
        return span
    owned = ((start, stop - 1), (stop - 1, end), *rest)
    return dataclasses.replace(span, owned=owned)


def _missing_element(span: Span) -> Span:
    *rest, (start, stop) = span.owned
    owned = (*rest, (start, max(start, stop - 1)))
    return dataclasses.replace(span, owned=owned)


def _on_rank_1(function: str, change: Callable[[Span], Span]) -> AbstractContextManager[Any]:
    return _each_span(function, change) if dist.get_rank() == 1 else nullcontext()


def _order_of_the_user(engine: Any) -> AbstractContextManager[Any]:
    """As if the order of round_robin_gradients were not known."""
    (parameters,) = engine.optimizer.bit16_groups
    assert [id(p) for p in parameters] != [
        id(p) for p in engine.optimizer.round_robin_bit16_groups[0]
    ]
    offsets = [0, *itertools.accumulate(p.numel() for p in parameters)][:-1]
    return patch.multiple(
        engine.optimizer,
        round_robin_bit16_groups=[parameters],
        round_robin_bit16_offsets=[offsets],
    )


FAULTS: dict[str, Fault] = {
    "order of round robin": _order_of_the_user,
    "offsets in a line": lambda _: _each_span("cut_line", _shifted),
    "offsets in chunks": lambda _: _each_span("cut_each", _shifted),
    "bounds in a line": lambda _: _each_span("cut_line", _moved_bounds),
    "bounds in chunks": lambda _: _each_span("cut_each", _moved_bounds),
    "an element that nobody holds": lambda _: _each_span("cut_each", _missing_element),
    "bounds on one rank": lambda _: _on_rank_1("cut_each", _missing_element),
}
"""Name -> how to put it into an engine that nobody has attached yet."""
