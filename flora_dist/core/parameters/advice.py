# SPDX-License-Identifier: Apache-2.0
"""What is known before a run about settings that will cost it: sentences for whoever starts it.

The formulas follow from the rules (core/step/momentum_rules.py) and from E[A^T A] = I alone, for
gradients that are independent from step to step; c is the relative noise of a sketch
(``matrices.relative_noise``), b = beta1, g = blend_gain, w = (1 - b) / (1 + b) the variance of a
whole average over that of one gradient.

    coverage     each window's subspace holds rank / block of a direction's square on average, so W
                 windows leave (1 - rank / block)^W of it where ``flora_strict`` cannot go
    break-even   above 1 an update has more noise than the gradient that it stands for:
                 ``flora_strict`` (1 + c) w, an average read out of its sketch (arXiv 2402.03293,
                 Algorithm 2); ``flora`` (1 + b^2 c) w, whose newest gradient is read as it is;
                 ``blend`` (1 - g b)^2 + g^2 b^2 w inside its subspace, whatever the ratio, which is
                 above 1 from g = (1 + b) / b on

The others have no such point. ``none`` and ``vectors`` step by the gradient, dense momenta by a
whole average. A A^T = (block / rank) I makes a projection of ``subspace_adam``'s average, without
noise of a sketch; ``ademamix`` adds it to a signal that grows as much. ``apollo`` scales blocks of
the gradient by the size of ``rank`` numbers: where s is that scale, chance multiplies the noise by
E[s^2] / E[s]^2, which is 1.4 at rank 4 and 3.1 at rank 1, where APOLLO itself (arXiv 2412.05270)
has one scale for a whole matrix.

A learning rate says something too. An update has a root mean square of at most ``clip``, and
Adafactor's relative steps (arXiv 1804.04235, section 8: up to 1e-2) are meant times RMS(weight).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flora_dist.core.sketch.matrices import relative_noise
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry

ENOUGH_COVERAGE = 0.9
USUAL_RMS = 0.02
"""Of matrices at the start, in most language models: a step of that size replaces them."""


def coverage(size: Geometry, kappa: int, steps: int) -> float:
    """Mean share of a direction's square that the windows of a run of ``steps`` steps reach.

    >>> from flora_dist.core.state.spec import geometry_of
    >>> size = geometry_of("w", (10, 64), FloraConfig(rank=8, block=64))
    >>> coverage(size, 1000, 999), round(coverage(size, 100, 1799), 2)
    (0.125, 0.91)
    """
    if size.rank is None:
        return 1.0
    return float(1 - (1 - size.rank / size.block) ** (1 + steps // kappa))


def noise_of_update(size: Geometry, config: FloraConfig) -> float:
    """Variance of an update over that of one gradient, where that follows from the rule alone.

    Of ``blend`` inside its subspace; 1 for the rules that have no break-even.

    >>> from flora_dist.core.state.spec import geometry_of
    >>> config = FloraConfig(momentum="flora_strict", rank=8, block=64)
    >>> round(noise_of_update(geometry_of("w", (10, 64), config), config), 2)
    0.42
    """
    if size.rank is None:
        return 1.0
    b, gain = config.beta1, config.gain_at(size.block / size.rank)
    average = (1 - b) / (1 + b)
    noise = relative_noise(config.sketch, rank=size.rank, block=size.block)
    found = {
        "flora": (1 + b**2 * noise) * average,
        "flora_strict": (1 + noise) * average,
        "blend": (1 - gain * b) ** 2 + (gain * b) ** 2 * average,
    }
    return found.get(config.momentum, 1.0)


def advice(held: Iterable[tuple[Geometry, FloraConfig]], steps: int) -> Iterator[str]:
    """One sentence for each kind of setting that a run of ``steps`` steps will suffer from.

    Args:
        held: geometry and settings of each parameter.
        steps: length of the whole run.
    """
    by_rule: dict[str, list[tuple[Geometry, FloraConfig]]] = {}
    for size, config in held:
        if size.rank is not None:
            by_rule.setdefault(config.momentum, []).append((size, config))
    if strict := by_rule.get("flora_strict"):
        least = min(strict, key=lambda held: coverage(held[0], held[1].kappa, steps))
        yield from _of_coverage(*least, steps)
    if whole := [*by_rule.get("flora", ()), *by_rule.get("flora_strict", ())]:
        yield from _of_noise(*max(whole, key=lambda held: noise_of_update(*held)))
    if blended := by_rule.get("blend"):
        yield from _of_gain(*max(blended, key=lambda held: noise_of_update(*held)))
    if any(size.rank == 1 for size, _ in by_rule.get("apollo", ())):
        yield (
            "momentum='apollo' at rank 1 scales each block by the size of one number, whose chance "
            "alone makes updates some three times as noisy. Raise rank to 4 or more."
        )


def advice_on_rate(groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A sentence where the largest lr of these groups can only be meant as a relative one."""
    plain = [group for group in groups if group["scale_parameter"] is not True]
    largest = max((float(group.get("initial_lr", group["lr"])) for group in plain), default=0.0)
    if largest < USUAL_RMS:
        return
    yield (
        f"lr={largest:g} looks like a relative step: it is the size of an update, and the matrices "
        f"of most models start with a root mean square of {USUAL_RMS}. Pass "
        f"lr={largest * USUAL_RMS:.2g}, or scale_parameter=True."
    )


def _of_coverage(size: Geometry, config: FloraConfig, steps: int) -> Iterator[str]:
    share = coverage(size, config.kappa, steps)
    if share >= ENOUGH_COVERAGE:
        return
    assert size.rank is not None
    windows = math.ceil(math.log(1 - ENOUGH_COVERAGE) / math.log(1 - size.rank / size.block))
    remedy = f"Set kappa={max(1, steps // windows)}"
    if steps < windows:
        remedy = "Raise rank"
    yield (
        f"momentum='flora_strict' moves weights only inside {size.rank} of {size.block} directions "
        f"per window: {steps} steps at kappa={config.kappa} reach {share:.0%} of each gradient. "
        f"{remedy}, or use the default rule."
    )


def _of_noise(size: Geometry, config: FloraConfig) -> Iterator[str]:
    ratio = noise_of_update(size, config)
    if ratio <= 1.0:
        return
    yield (
        f"momentum={config.momentum!r} at rank {size.rank} per block of {size.block} and "
        f"beta1={config.beta1} has {ratio:.2g} times the noise of the gradient it averages. Raise "
        "rank or beta1, or use the default rule."
    )


def _of_gain(size: Geometry, config: FloraConfig) -> Iterator[str]:
    ratio = noise_of_update(size, config)
    if ratio <= 1.0:
        return
    assert size.rank is not None
    most = (1 + config.beta1) / config.beta1
    yield (
        f"momentum='blend' at blend_gain={config.gain_at(size.block / size.rank):g} and "
        f"beta1={config.beta1} has {ratio:.2g} times the noise of the gradient inside its "
        f"subspace: more from {most:.2g} on. Pass blend_gain=1 and a larger rank."
    )
