# SPDX-License-Identifier: Apache-2.0
"""Bodies of ``test_low_precision.py``: an inf in a gradient, and the step that is none."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist import Flora
from flora_dist.core.layouts.flat import FlatPart
from flora_dist.core.parameters.registry import Registry
from tests.battery.oracle import STEPS
from tests.battery.variants import differing
from tests.zero.engines import (
    Run,
    Weights,
    counts,
    masters,
    start,
    states,
    take_step,
    whole_weights,
)
from tests.zero.expected import distances_that_move, reference_for

POISONED = 4
"""The step at which the gradient holds an inf; a window opens at the next."""


def overflow(run: Run) -> dict[str, Any]:
    """An inf in the last rank's gradient at one step of ten: what that step changed."""
    engine, flora = start(run)
    for step in range(POISONED):
        take_step(engine, step)
    before, scale = _everything(engine, flora), _scale(engine)
    with _an_inf(engine):
        take_step(engine, POISONED)
    result = {
        "changed": differing(before, _everything(engine, flora)),
        "compared": len(before),
        "scales": [scale, _scale(engine)],
        "skipped": engine.skipped_steps,
        "counts": [_all(counts(flora))],
    }
    for step in range(POISONED + 1, STEPS):
        take_step(engine, step)
    result["counts"].append(_all(counts(flora)))
    result["masters"] = masters(engine)
    engine.destroy()
    return result


def _all(found: dict[str, set[tuple[int, int]]]) -> set[tuple[int, int]]:
    return set().union(*found.values())


def follow_gradients(run: Run) -> tuple[Weights, tuple[float, float]]:
    """Masters, and their distances to a reference that gets the gradients that Flora got."""
    engine, flora = start(run)
    first = masters(engine)
    reference = reference_for(run, first)
    gradients = {name: torch.zeros_like(weight) for name, weight in first.items()}

    def take_down(optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        for slot in flora._roster.present(optimizer.param_groups, flora.state):
            mine = slot.part.gradient()
            assert mine is not None
            if isinstance(slot.part, FlatPart):
                place = slice(*slot.part.span.owned[dist.get_rank()])
                gradients[slot.part.name].view(-1)[place] = mine
            else:  # whole on every rank
                gradients[slot.part.name].copy_(mine / dist.get_world_size())

    flora.register_step_pre_hook(take_down)
    for step in range(STEPS):
        for gradient in gradients.values():
            gradient.zero_()
        take_step(engine, step, run.uses_extra(step))
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        reference.step(gradients)
    last = masters(engine)
    engine.destroy()
    return last, distances_that_move(first, dict(reference.weights), last)


def leave_out(run: Run) -> Weights:
    """Masters after the same steps without the poisoned one."""
    engine, _ = start(run)
    for step in range(STEPS):
        if step != POISONED:
            take_step(engine, step)
    found = masters(engine)
    engine.destroy()
    return found


def counts_from_the_start(run: Run, steps: Iterable[int]) -> list[set[tuple[int, int]]]:
    """(step, window) of all parameters right after building, and after each step."""
    engine, flora = start(run)
    found = [_all(counts(flora))]
    for step in steps:
        take_step(engine, step)
        found.append(_all(counts(flora)))
    engine.destroy()
    return found


def step_in_the_constructor(run: Run) -> str:
    """What an engine's constructor says if its step on zeros were a step; empty if nothing."""
    original = Registry.is_rehearsal
    Registry.is_rehearsal = lambda self, groups, state: False  # type: ignore[method-assign]  # noqa: ARG005
    try:
        engine, _ = start(run)
        engine.destroy()
    except ValueError as error:
        return str(error)
    finally:
        Registry.is_rehearsal = original  # type: ignore[method-assign]
    return ""


@contextmanager
def _an_inf(engine: Any) -> Any:
    """One element of one gradient, on the last rank alone, and in its last micro-batch."""
    parameter = engine.module.down.weight
    rank, world_size = dist.get_rank(), dist.get_world_size()
    seen = 0

    def poison(gradient: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if rank < world_size - 1 or seen < engine.gradient_accumulation_steps():
            return gradient
        poisoned = gradient.clone()
        poisoned.view(-1)[0] = torch.inf
        return poisoned

    hook = parameter.register_hook(poison)
    yield
    hook.remove()
    assert seen == engine.gradient_accumulation_steps(), seen


def _everything(engine: Any, flora: Flora) -> dict[str, Any]:
    """Copies of this rank's weights, partitions, states and counters."""
    found: dict[str, Any] = dict(whole_weights(engine))
    for index, tensor in enumerate(flora.state):
        # As whole numbers: the padding of a partition is not always numbers.
        found[f"{index}"] = tensor.detach().clone().view(torch.int32)
        for name, state in states(flora, tensor).items():
            for key, value in state.items():
                is_tensor = isinstance(value, Tensor)
                found[f"{index}.{name}.{key}"] = value.clone() if is_tensor else value
    return found


def _scale(engine: Any) -> float:
    return float(getattr(engine.optimizer, "loss_scale", 1.0))
