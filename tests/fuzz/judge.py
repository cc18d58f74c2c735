# SPDX-License-Identifier: Apache-2.0
"""The reference of a case, and how far from it a run may be.

float64 under rates that are no fp32 tensors runs free to the end; of everything else each step
starts from the reference's weights, so that a tolerance is that of one step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.state.settings import KNOBS, FloraConfig
from flora_dist.reference import Reference, ReferenceSettings
from tests.battery.oracle import random_bits, sketches
from tests.fuzz.cases import Case, Parameter

# Error over movement. float64: the project's bound. float32: a hundred roundings of a sum.
EXACT, SINGLE = 1e-11, 2e-5
# What a step adds to a weight by rounding alone, over the weight.
ROUNDING = {torch.float64: 2**-50, torch.float32: 2**-21}
# Elements that may be rounded the other way: both codes compute in another order, so a threshold
# lies between them once in 2^13 (fp16) or 2^16 (bf16) elements.
FLIPPED, FLIPPED_AT_LEAST = 0.01, 2
Mine = Callable[[Tensor], Tensor]
"""What this process holds of a whole tensor."""


def draw(case: Case, name: str, step: int, shape: tuple[int, ...], kind: str = "normal") -> Tensor:
    """A gradient of some kind, or the start value of a weight, in float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.label} {name} {step}".encode()))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if values.ndim:
        values *= torch.linspace(0.1, 3.0, values.shape[-1], dtype=torch.float64)
    if kind == "zero rows" and values.ndim:
        values[:: 1 + step % 2] = 0
        return values
    if kind == "one element" and values.numel():
        kept = values.flatten()[-1].clone()
        values.zero_().view(-1)[values.numel() // 2] = kept
        return values
    return values * {"tiny": 1e-10, "large": 1e3, "zeros": 0.0}.get(kind, 1.0)


def poisoned(gradient: Tensor, value: float) -> Tensor:
    """The gradient with one element of this value."""
    gradient = gradient.clone()
    gradient.view(-1)[gradient.numel() // 3] = value
    return gradient


class Judge:
    """The reference beside a run of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.parameters = {p.name: p for p in case.parameters}
        self.start = {p.name: _start(case, p) for p in case.parameters}
        configs = {p.name: _config(case, p) for p in case.parameters}
        sketch, bits = {}, {}
        for p in case.parameters:
            wide = torch.promote_types(dtype_of(p), torch.float32)
            sketch[p.name] = sketches(configs[p.name], {p.name: p.shape}, wide)
            bits[p.name] = random_bits(configs[p.name], {p.name: p.shape})
        self.reference = Reference(
            {name: weight for name, weight in self.start.items() if weight.numel()},
            sketch=lambda name, matrix, window: sketch[name](name, matrix, window),
            settings=lambda name: _settings(case, self.parameters[name]),
            bits=lambda name, *what: bits[name](name, *what),
        )
        self.before: dict[str, Tensor] = {}

    def step(self, gradients: Mapping[str, Tensor | None], rates: tuple[float, ...]) -> None:
        """Step the reference; it skips what is not finite where the run does."""
        reference = self.reference
        self.before = {name: weight.clone() for name, weight in reference.weights.items()}
        for name in reference.weights:
            index = self.parameters[name].group
            lr = _as_given(rates[index], self.case.groups[index].rates)
            reference._settings[name] = replace(reference._settings[name], lr=lr)
        present = {n: g for n, g in gradients.items() if g is not None and n in reference.weights}
        finite = all(bool(g.isfinite().all()) for g in present.values())
        if finite or not self.case.settings["skip_nonfinite"]:
            reference.step(present)

    def is_free(self, name: str) -> bool:
        """Whether the run goes on with its own weights."""
        parameter = self.parameters[name]
        rates = self.case.groups[parameter.group].rates
        return parameter.dtype == "float64" and rates != "float32"

    def weight_is_wrong(self, name: str, got: Tensor, mine: Mine) -> str:
        """What is wrong with a weight, or with this rank's part of it; empty if nothing is."""
        if name not in self.reference.weights:
            return "" if got.numel() == 0 else "an empty parameter has elements"
        whole, before = self.reference.weights[name], self.before[name]
        tight = EXACT if self.is_free(name) else SINGLE
        move = (whole.double() - before.double()).abs()
        wide = torch.promote_types(whole.dtype, torch.float32)
        wide = wide if self.is_free(name) else torch.float32
        if self.is_free(name):  # errors of all steps so far
            move = torch.maximum(move, (whole - self.start[name]).abs())
        slack = tight * float(move.max()) + ROUNDING[wide] * mine(whole).double().abs()
        if self._momentum_dtype(name) == torch.bfloat16 and self.case.layout != "whole":
            # A momentum that was rounded the other way stays so.
            slack += 2**-7 * float(move.max())
        return _difference(got, mine(whole), slack)

    def state_is_wrong(self, name: str, kept: Mapping[str, Any]) -> str:
        """What is wrong with a whole state, in the same way."""
        if name not in self.reference.weights:
            return f"an empty parameter has state: {sorted(kept)}" if kept else ""
        expected = self.reference.state(name)
        if not kept and expected["step"] == 0:
            return ""
        tight = EXACT if self.parameters[name].dtype == "float64" else SINGLE
        for key, value in expected.items():
            if not isinstance(value, Tensor):
                if kept.get(key) != value:
                    return f"{key} is {kept.get(key)}, should be {value}"
                continue
            # A momentum is a sum of normalised gradients, of size 1, which may cancel.
            size = 1.0 if key == "momentum" else 0.0
            size = max(size, float(value.double().abs().max()))
            slack = torch.full_like(value, tight * size, dtype=torch.float64)
            if wrong := _difference(kept[key].reshape(value.shape), value, slack):
                return f"{key}: {wrong}"
        return ""

    def momentum(self, name: str) -> Tensor | None:
        """Of the reference, where roundings must not add up."""
        if self._momentum_dtype(name) != torch.bfloat16 or name not in self.reference.weights:
            return None
        found = self.reference.state(name)["momentum"]
        assert isinstance(found, Tensor)
        return found

    def _momentum_dtype(self, name: str) -> torch.dtype:
        settings = self.case.groups[self.parameters[name].group].settings
        kept = self.reference._state.get(name, {})
        is_low = settings["state_dtype"] == "bfloat16" and "momentum" in kept
        return torch.bfloat16 if is_low else torch.float32


def _difference(got: Tensor, expected: Tensor, slack: Tensor) -> str:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {tuple(got.shape)} for {expected.dtype} {tuple(expected.shape)}"
    apart = (got.double() - expected.double()).abs()
    off = ~(apart <= slack)
    if not bool(off.any()):
        return ""
    worst = f"{float((apart / slack.clamp(min=1e-300)).max()):.3g} times the tolerance"
    if got.dtype not in {torch.bfloat16, torch.float16}:
        return f"{int(off.sum())} of {off.numel()} elements off, by up to {worst}"
    info = torch.finfo(got.dtype)
    size = torch.maximum(got.double().abs(), expected.double().abs()).clamp(
        min=info.smallest_normal
    )
    if not bool((apart <= info.eps * size + slack).all()):
        return f"rounded by more than one spacing, {worst}"
    if int(off.sum()) > max(FLIPPED_AT_LEAST, FLIPPED * off.numel()):
        return f"{int(off.sum())} of {off.numel()} elements rounded the other way"
    return ""


def dtype_of(parameter: Parameter) -> torch.dtype:
    found = getattr(torch, parameter.dtype)
    assert isinstance(found, torch.dtype)
    return found


def _start(case: Case, parameter: Parameter) -> Tensor:
    return 0.5 * draw(case, parameter.name, -1, parameter.shape).to(dtype_of(parameter))


def _config(case: Case, parameter: Parameter) -> FloraConfig:
    given = {**case.settings, **case.groups[parameter.group].settings}
    return FloraConfig(**{knob: given[knob] for knob in KNOBS if knob in given})


def _settings(case: Case, parameter: Parameter) -> ReferenceSettings:
    group = case.groups[parameter.group]
    shared = set(ReferenceSettings.__dataclass_fields__) & set(group.settings) - {"state_dtype"}
    given = {key: group.settings[key] for key in shared}
    given["weight_decay"] = _as_given(given["weight_decay"], group.rates)
    low = torch.bfloat16 if group.settings["state_dtype"] == "bfloat16" else None
    return ReferenceSettings(**given, state_dtype=low)


def _as_given(rate: float, how: str) -> float:
    """The number that a rate is once it is a tensor."""
    return rate if how == "number" else float(torch.tensor(rate, dtype=getattr(torch, how)))
