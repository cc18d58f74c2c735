# SPDX-License-Identifier: Apache-2.0
"""What is known before a run about settings that will cost it: sentences for whoever starts it.

Both formulas follow from E[A^T A] = I alone; c is the relative noise of a sketch
(``matrices.relative_noise``), b = beta1. They hold for the two rules that read momentum out of its
sketch as if it were whole, ``flora`` and ``flora_strict`` (arXiv 2402.03293).

    coverage     each window's subspace holds rank / block of a direction's square on average, so W
                 windows leave (1 - rank / block)^W of it where ``flora_strict`` cannot go
    break-even   noise that is new at each step has the variance (1 - b) / (1 + b) of one gradient
                 in a whole average, and (1 + c) times that in a sketched one: above 1 the average
                 is noisier than the gradient it stands for

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
_READ_WHOLE = ("flora", "flora_strict")


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


def noise_of_momentum(size: Geometry, config: FloraConfig) -> float:
    """Variance of a sketched average over that of one gradient, where steps are independent."""
    if size.rank is None:
        return 0.0
    noise = relative_noise(config.sketch, rank=size.rank, block=size.block)
    return (1 + noise) * (1 - config.beta1) / (1 + config.beta1)


def advice(held: Iterable[tuple[Geometry, FloraConfig]], steps: int) -> Iterator[str]:
    """One sentence for each kind of setting that a run of ``steps`` steps will suffer from.

    Args:
        held: geometry and settings of each parameter.
        steps: length of the whole run.
    """
    read_whole = [
        (size, config)
        for size, config in held
        if size.rank is not None and config.momentum in _READ_WHOLE
    ]
    strict = [(s, c) for s, c in read_whole if c.momentum == "flora_strict"]
    if strict:
        least = min(strict, key=lambda held: coverage(held[0], held[1].kappa, steps))
        yield from _of_coverage(*least, steps)
    if read_whole:
        yield from _of_noise(*max(read_whole, key=lambda held: noise_of_momentum(*held)))


def advice_on_rate(groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A sentence where the largest lr of these groups can only be meant as a relative one."""
    plain = [group for group in groups if not group["scale_parameter"]]
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
    ratio = noise_of_momentum(size, config)
    if ratio <= 1.0:
        return
    yield (
        f"momentum={config.momentum!r} at rank {size.rank} per block of {size.block} and "
        f"beta1={config.beta1} has {ratio:.2g} times the noise of the gradient it averages. Raise "
        "rank or beta1, or use the default rule."
    )
