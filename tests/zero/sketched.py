# SPDX-License-Identifier: Apache-2.0
"""Runs with sketched gradients by ``reference.py``, which is fed with what sketches stand for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flora_dist.core.layouts.flat import FlatPart
from tests.battery import zoo
from tests.battery.oracle import STEPS, trainable
from tests.gradients.oracle import GradientSketch, SketchedCase, norm_of
from tests.zero.engines import MAX_NORM, SAMPLES, Run, Weights, build, masters, start, take_step
from tests.zero.expected import distances_that_move, reference_for

COMPRESSED = {"flora": {"gradients": "compressed", "gradient_bits": 32}}
FUSED = {"flora": {"gradients": "fused"}}


def sketches_of(run: Run) -> GradientSketch:
    """The run's settings, and the rank of its gradients' sketches."""
    rank = run.config["flora"].get("gradient_rank")
    case = SketchedCase(dtype=torch.float32, settings=run.settings, gradient_rank=rank)
    return GradientSketch(case)


def follow(run: Run, max_norm: float = MAX_NORM) -> tuple[Weights, Weights, list[float]]:
    """Weights before and after the run, and each step's norm: of sketches, exact where dense.

    A parameter without gradient is skipped where it is sketched; where it is dense, DeepSpeed
    passes zeros or its last gradient.
    """
    model = build()
    first = trainable(model)
    reference, sketches = reference_for(run, first), sketches_of(run)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    last = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for step in range(1, STEPS + 1):
        model.zero_grad()
        model(zoo.batch(step - 1, SAMPLES), run.uses_extra(step - 1)).backward()
        seen: Weights = {}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                seen[name] = last[name] = parameter.grad.clone()
            elif sketches.compressed(name, parameter.detach(), step) is None:
                seen[name] = last[name] if run.stale else torch.zeros_like(parameter)
        norm = norm_of(sketches, seen, step)
        norms.append(float(norm))
        scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        reference.step({n: sketches.seen(n, g, step) / scale for n, g in seen.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return first, dict(reference.weights), norms


def follow_own_gradients(run: Run) -> tuple[tuple[float, float], float]:
    """Distances of masters, and the worst of norms, to a reference with the engine's gradients.

    Of sketched parameters as autograd gave them, summed in fp32; dense ones as Flora got them.
    """
    engine, flora = start(run)
    first = masters(engine)
    reference, sketches = reference_for(run, first), sketches_of(run)
    sums = {n: torch.zeros_like(w) for n, w in first.items() if _is_sketched(sketches, n, w)}
    dense: Weights = {}
    for name, parameter in engine.module.named_parameters():
        if name in sums:
            parameter.register_hook(lambda gradient, sum_=sums[name]: _add(sum_, gradient))
    flora.register_step_pre_hook(lambda *_: dense.update(_dense_gradients(flora, sums)))
    worst = 0.0
    for step in range(1, STEPS + 1):
        loss_scale = float(engine.optimizer.loss_scale)
        dense.clear()
        take_step(engine, step - 1)
        for gradient in (*sums.values(), *dense.values()):
            dist.all_reduce(gradient)
        norm = float(engine.get_global_grad_norm())
        clip = max(1.0, (norm + 1e-6) / MAX_NORM)
        seen = {n: g / (loss_scale * dist.get_world_size()) for n, g in sums.items()}
        own = norm_of(sketches, {**seen, **{n: g * clip for n, g in dense.items()}}, step)
        worst = max(worst, abs(norm / float(own) - 1.0))
        reference.step({**{n: sketches.seen(n, g / clip, step) for n, g in seen.items()}, **dense})
        for gradient in sums.values():
            gradient.zero_()
    last = masters(engine)
    engine.destroy()
    return distances_that_move(first, dict(reference.weights), last), worst


def _is_sketched(sketches: GradientSketch, name: str, weight: Tensor) -> bool:
    return sketches.compressed(name, weight, 1) is not None


def _add(sum_: Tensor, gradient: Tensor) -> None:
    sum_ += gradient.float()


def _dense_gradients(flora: Any, sketched: Weights) -> Weights:
    """This rank's share in a sum over ranks; the optimizer's groups come one after the other."""
    found = {}
    for slot in flora._roster.present(flora.param_groups, flora.state):
        part = slot.part
        if part.name in sketched:
            continue
        mine = part.gradient()
        if isinstance(part, FlatPart):
            whole = torch.zeros(part.shape).view(-1)
            whole[slice(*part.span.owned[dist.get_rank()])] = mine
            found[part.name] = whole.view(part.shape)
        else:
            found[part.name] = mine / dist.get_world_size()
    return found
