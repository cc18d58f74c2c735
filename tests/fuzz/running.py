# SPDX-License-Identifier: Apache-2.0
"""Runs a case beside its reference and says where the two part."""

from __future__ import annotations

import contextlib
import io
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flora_dist import Flora
from tests.fuzz.cases import Case, Moment
from tests.fuzz.holders import Holder, Whole, holder_of, saved
from tests.fuzz.judge import Judge, draw, dtype_of, poisoned

Gradients = dict[str, Tensor | None]


def run(case: Case) -> list[str]:
    """What is wrong at the first step where anything is; empty if nothing is."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="transfer='paper'")
        try:
            return _run(case)
        except Exception:
            return [traceback.format_exc()]


def run_all(cases: Sequence[Case]) -> list[list[str]]:
    """The same for many; a body for a pool of ranks."""
    return [run(case) for case in cases]


def _run(case: Case) -> list[str]:
    judge = Judge(case)
    holder = holder_of(case, judge.start)
    optimizer = _built(case, holder, 0)
    for step, moment in enumerate(case.moments):
        for index, group in enumerate(case.groups):
            if step and group.joins == step:
                optimizer.add_param_group(_group(case, holder, index))
        if moment.round_trip:
            optimizer = _replaced(case, holder, optimizer, step, moment.round_trip)
        gradients = _set_gradients(case, holder, step, moment)
        _freeze(case, holder, moment.frozen)
        for group, rate in zip(optimizer.param_groups, moment.rates, strict=False):
            _set(group, "lr", rate)
        judge.step(gradients, moment.rates)
        optimizer.step()
        _freeze(case, holder, frozenset())
        if wrong := _wrongs(judge, holder, optimizer):
            return [f"step {step}: {each}" for each in wrong]
        _follow(judge, holder, optimizer)
    return []


def _built(case: Case, holder: Holder, step: int, **settings: Any) -> Flora:
    """An optimizer of the groups that are there at a step."""
    here = [index for index, group in enumerate(case.groups) if group.joins <= step]
    groups = [{**_group(case, holder, index), **settings} for index in here]
    optimizer = Flora(groups, **case.settings)
    holder.attach(optimizer)
    return optimizer


def _group(case: Case, holder: Holder, index: int) -> dict[str, Any]:
    group = case.groups[index]
    given = {"params": holder.tensors(index), **group.settings, "lr": 1.0}
    if group.rates != "number":
        dtype = getattr(torch, group.rates)
        given |= {key: torch.tensor(given[key], dtype=dtype) for key in ("lr", "weight_decay")}
    return given


def _set(group: dict[str, Any], key: str, value: float) -> None:
    """As torch's schedulers do."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def _replaced(case: Case, holder: Holder, optimizer: Flora, step: int, how: str) -> Flora:
    if how in {"pickle", "deepcopy"}:
        assert isinstance(holder, Whole)
        return holder.copied(how, optimizer)
    # Loading brings the settings of the run that was saved.
    fresh = _built(case, holder, step, beta1=0.25, clip=7.0)
    fresh.load_state_dict(saved(optimizer, how))
    return fresh


def _set_gradients(case: Case, holder: Holder, step: int, moment: Moment) -> Gradients:
    """Give each parameter its gradient; returns what all ranks together have."""
    whole: Gradients = {}
    for parameter in case.parameters:
        name, missing = parameter.name, moment.missing.get(parameter.name, ())
        if name not in moment.kinds:  # not there yet
            continue
        drawn = draw(case, name, step, parameter.shape, moment.kinds[name])
        gradient = drawn.to(dtype_of(parameter))
        if moment.poison is not None and moment.poison[0] == name:
            gradient = poisoned(gradient, moment.poison[1])
        holder.give(name, gradient, missing)
        is_anywhere = len(missing) < case.ranks
        if missing and is_anywhere:
            gradient = holder.without(name, gradient, missing)
        whole[name] = gradient if is_anywhere and name not in moment.frozen else None
    return whole


def _freeze(case: Case, holder: Holder, names: frozenset[str]) -> None:
    for parameter in case.parameters:
        holder.stepped(parameter.name).requires_grad_(parameter.name not in names)


def _wrongs(judge: Judge, holder: Holder, optimizer: Flora) -> list[str]:
    found = []
    for name in judge.parameters:
        wrong = ""
        if name in judge.before or not judge.start[name].numel():
            wrong = judge.weight_is_wrong(name, holder.local(name), _mine(holder, name))
        if not wrong and isinstance(holder, Whole):
            wrong = judge.state_is_wrong(name, holder.state(optimizer, name))
        elif not wrong:
            count = holder.state(optimizer, name).get("step", 0)
            expected = judge.reference.state(name)["step"]
            wrong = "" if count == expected else f"step is {count}, should be {expected}"
        if wrong:
            found.append(f"{judge.parameters[name]}: {wrong}")
    return found


def _mine(holder: Holder, name: str) -> Any:
    return lambda whole: holder.mine(name, whole)


def _follow(judge: Judge, holder: Holder, optimizer: Flora) -> None:
    """Put the reference's numbers where roundings must not add up over the steps."""
    for name, weight in judge.reference.weights.items():
        if not judge.is_free(name):
            holder.local(name).copy_(holder.mine(name, weight))
        momentum, kept = judge.momentum(name), holder.state(optimizer, name)
        if isinstance(holder, Whole) and momentum is not None and "momentum" in kept:
            kept["momentum"].copy_(momentum.reshape(kept["momentum"].shape))
