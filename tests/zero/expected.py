# SPDX-License-Identifier: Apache-2.0
"""The same run by ``reference.py``: one process, whole batches, DeepSpeed's clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_dist.core.state.settings import KNOBS, FloraConfig
from flora_dist.reference import Reference, ReferenceSettings
from tests.battery import zoo
from tests.battery.oracle import STEPS, distances, random_bits, sketches, trainable
from tests.zero.engines import MAX_NORM, SAMPLES, Run, Weights, build, settings_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES["bf16 alone"] = torch.bfloat16


def follow(run: Run, max_norm: float = MAX_NORM) -> tuple[Weights, Weights, list[float]]:
    """Weights before and after the run in fp32, and the norm of each step's gradient.

    It starts where ZeRO's masters do: at weights as the model's dtype holds them.
    """
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPES[run.dtype]))
    start = trainable(model)
    reference = reference_for(run, start)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # Where no loss uses a parameter ZeRO passes zeros, not None.
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for step in range(STEPS):
        model.zero_grad()
        model(zoo.batch(step, SAMPLES), run.uses_extra(step)).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
            elif not run.stale:
                gradients[name].zero_()
        norms.append(float(_norm(gradients)))
        reference.step(clip(gradients, max_norm))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(reference.weights[name])
    return start, dict(reference.weights), norms


def clip(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """G / max(1, (|G| + 1e-6) / max_norm), as all of DeepSpeed's optimizers have it."""
    scale = ((_norm(gradients) + 1e-6) / max_norm).clamp(min=1.0)
    return {name: gradient / scale for name, gradient in gradients.items()}


def _norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


def reference_for(run: Run, weights: Weights) -> Reference:
    """The oracle for these weights under a run's settings."""
    knobs = {key: value for key, value in run.case.flora.items() if key in KNOBS}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    config = FloraConfig(**knobs)
    # Its momentum is in the arithmetic's dtype, which is float32.
    known = set(ReferenceSettings.__dataclass_fields__) - {"state_dtype"}

    def settings(name: str) -> ReferenceSettings:
        given = {**run.case.flora, **(settings_of(name) if run.groups else {})}
        return ReferenceSettings(**{k: v for k, v in given.items() if k in known})

    return Reference(
        weights,
        sketch=sketches(config, shapes, torch.float32),
        settings=settings,
        bits=random_bits(config, shapes),
    )


def distances_that_move(start: Weights, expected: Weights, got: Weights) -> tuple[float, float]:
    """(whole model, worst parameter), over movement; what the reference leaves is left in bits."""
    still = [name for name, weight in start.items() if torch.equal(weight, expected[name])]
    assert still == ["never.weight"], still
    assert torch.equal(got["never.weight"], start["never.weight"])
    parts = ({n: w for n, w in each.items() if n not in still} for each in (start, expected, got))
    return distances(*parts)
