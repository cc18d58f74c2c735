# SPDX-License-Identifier: Apache-2.0
"""Learning rates: every scheduler of torch, and rates that are tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from flora_dist import Flora
from tests.optimizer import runs

SCHEDULERS: dict[str, Callable[[Flora], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 8, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-3, 3),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_drives_the_rate(name: str, *, as_tensor: bool) -> None:
    """Each step is the step of a fresh group whose lr is what the scheduler asks SGD for."""
    shapes = {"wide": (5, 20), "bias": (7,)}
    parameters, by_hand, other = runs.build(shapes), runs.build(shapes), runs.build(shapes)
    lr: float | Tensor = torch.tensor(1e-2, dtype=torch.float64) if as_tensor else 1e-2
    optimizer = Flora(parameters.items(), **{**runs.SETTINGS, "lr": lr}, weight_decay=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    sgd = torch.optim.SGD(other.values(), lr=1e-2)
    sgd_scheduler: Any = SCHEDULERS[name](sgd)
    manual = Flora(by_hand.items(), **runs.SETTINGS, weight_decay=0.1)
    rates = []
    for step in range(6):
        manual.param_groups[0]["lr"] = float(sgd.param_groups[0]["lr"])
        rates.append(manual.param_groups[0]["lr"])
        for each, driver in ((parameters, scheduler), (by_hand, None), (other, sgd_scheduler)):
            runs.set_gradients(each, step)
            taken = {id(scheduler): optimizer, id(sgd_scheduler): sgd}.get(id(driver), manual)
            taken.step()
            if driver is not None:
                driver.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(set(rates)) > 1
    for parameter, expected in zip(parameters.values(), by_hand.values(), strict=True):
        # a 0-dim tensor as lr multiplies in another order than a number: a few roundings
        torch.testing.assert_close(parameter, expected, rtol=1e-13, atol=1e-15)


CYCLES: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2),
}


@pytest.mark.parametrize("name", CYCLES)
def test_a_scheduler_that_cycles_momentum_cycles_beta1(name: str) -> None:
    """It wrote a number into "momentum", which names a rule, and the next step was refused."""
    parameters, by_hand = runs.build(), runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    manual = Flora(by_hand.items(), **runs.SETTINGS)
    adam = torch.optim.Adam(runs.build().values(), lr=1e-2)
    scheduler, theirs = CYCLES[name](optimizer), CYCLES[name](adam)
    wanted = []
    for step in range(6):
        group = adam.param_groups[0]
        wanted.append(group["betas"][0])
        manual.param_groups[0] |= {"lr": group["lr"], "beta1": group["betas"][0]}
        runs.set_gradients(parameters, step)
        runs.set_gradients(by_hand, step)
        for each in (optimizer, manual, adam, scheduler, theirs):
            each.step()
        assert optimizer.param_groups[0]["beta1"] == wanted[-1]
        assert optimizer.param_groups[0]["beta2"] is None
    assert len(set(wanted)) > 2
    runs.assert_equal(runs.values(parameters), runs.values(by_hand))


def test_a_state_saved_between_scheduler_and_step_goes_on_with_the_cycle() -> None:
    finals = []
    for stops in (False, True):
        parameters = runs.build()
        optimizer = Flora(parameters.items(), **runs.SETTINGS)
        scheduler: Any = CYCLES["OneCycleLR"](optimizer)
        for step in range(6):
            if stops and step == 3:
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                optimizer = Flora(parameters.items(), **runs.SETTINGS)
                scheduler = CYCLES["OneCycleLR"](optimizer)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            runs.set_gradients(parameters, step)
            optimizer.step()
            scheduler.step()
        finals.append(runs.values(parameters))
    runs.assert_equal(finals[0], finals[1])


@pytest.mark.parametrize("kernels", ["torch", ""])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lr_and_weight_decay_may_be_tensors(
    kernels: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORA_DIST_KERNELS", kernels)
    # small pieces: each expert is its own, so that a rate of one element meets several
    monkeypatch.setattr("flora_dist.core.step.views.CPU_ELEMENTS", 16)
    finals = []
    for as_tensor in (False, True):
        parameters = runs.build(dtype=dtype)
        # powers of two: products with them are exact, so both ways round alike
        lr, decay = 2.0**-7, 2.0**-5
        given: dict[str, Any] = {"lr": lr, "weight_decay": decay}
        if as_tensor:
            given = {key: torch.full(shape, value) for key, value in given.items()}
        optimizer = Flora(parameters.items(), **{**runs.SETTINGS, **given})
        runs.train(optimizer, parameters, range(4))
        finals.append(runs.values(parameters))
    runs.assert_equal(finals[0], finals[1])
