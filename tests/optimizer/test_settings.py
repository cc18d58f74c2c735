# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused with subject, rule, value and remedy, and changes nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora
from tests.optimizer import runs

NAN = math.nan

# A bad setting of one group, and what its error must say.
BAD_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"rank": 0}, ["rank", "at least 1", "got 0", "None"]),
    ({"rank": -3}, ["rank", "at least 1", "got -3", "None"]),
    ({"rank": 2.0}, ["rank", "whole number", "got 2.0", "Pass"]),
    ({"rank": True}, ["rank", "whole number", "got True", "Pass"]),
    (
        {"rank": 8, "block": 8, "state_dtype": "float32"},
        ["rank must be below block", "rank=8", "block=8", "Lower rank"],
    ),
    (
        {"rank": 9, "block": 8, "state_dtype": "float32"},
        ["rank must be below block", "rank=9", "block=8", "rank=None"],
    ),
    ({"block": 48}, ["block", "power of two", "got 48", "Pass 16"]),
    ({"block": 0}, ["block", "power of two", "got 0", "Pass 16"]),
    ({"block": 64.0}, ["block", "power of two", "got 64.0", "Pass 16"]),
    ({"block": "ful"}, ["block", "'full'", "got 'ful'", "Pass 16"]),
    ({"sketch": "hadamrd"}, ["sketch", "rademacher", "'hadamrd'", "Did you mean 'hadamard'"]),
    ({"momentum": "flora_strct"}, ["momentum", "blend", "Did you mean 'flora_strict'"]),
    ({"transfer": "shrnk"}, ["transfer", "reset", "'shrnk'", "Did you mean 'shrink'"]),
    ({"state_dtype": "bfloat"}, ["state_dtype", "'bfloat'", "Did you mean 'bfloat16'"]),
    ({"state_dtype": torch.bfloat16}, ["state_dtype", "float32", "got torch.bfloat16"]),
    ({"momentum": 0.9}, ["momentum", "one of", "got 0.9", "beta1"]),
    ({"kappa": 0}, ["kappa", "at least 1", "got 0", "Pass 1"]),
    ({"kappa": 10.0}, ["kappa", "whole number", "got 10.0", "Pass 1"]),
    ({"lr": NAN}, ["lr", "[0, inf)", "got nan", "Pass a finite number"]),
    ({"lr": -1e-3}, ["lr", "[0, inf)", "got -0.001", "Pass a finite number"]),
    ({"lr": math.inf}, ["lr", "[0, inf)", "got inf", "Pass a finite number"]),
    ({"lr": "1e-3"}, ["lr", "a number or a tensor", "got '1e-3'"]),
    ({"lr": None}, ["lr", "a number or a tensor", "got None"]),
    ({"weight_decay": NAN}, ["weight_decay", "[0, inf)", "got nan", "Pass a finite number"]),
    ({"weight_decay": -0.1}, ["weight_decay", "[0, inf)", "got -0.1", "Pass a finite number"]),
    ({"beta1": 1.0}, ["beta1", "[0, 1)", "got 1.0", "Pass a finite number"]),
    ({"beta1": NAN}, ["beta1", "[0, 1)", "got nan", "Pass a finite number"]),
    ({"beta2": -0.1}, ["beta2", "[0, 1)", "got -0.1", "Pass a finite number"]),
    ({"beta2": 1}, ["beta2", "[0, 1)", "got 1", "Pass a finite number"]),
    ({"eps": 0.0}, ["eps", "[1e-37, inf)", "got 0.0", "Pass a finite number"]),
    ({"eps": NAN}, ["eps", "[1e-37, inf)", "got nan", "Pass a finite number"]),
    ({"eps": -1e-8}, ["eps", "[1e-37, inf)", "got -1e-08", "Pass a finite number"]),
    ({"clip": 0.0}, ["clip", "above 0", "got 0", "None"]),
    ({"clip": NAN}, ["clip", "[0, inf)", "got nan", "Pass a finite number"]),
    ({"normalise": "row"}, ["normalise", "factored, rows, columns", "Did you mean 'rows'"]),
    (
        {"momentum": "ademamix", "sketch": "gaussian"},
        ["momentum='ademamix'", "A A^T", "sketch='gaussian'", "Use sketch='hadamard'"],
    ),
    ({"blend_gain": -1.0}, ["blend_gain", "[0, inf)", "got -1.0", "Pass a finite number"]),
    ({"strict": "yes"}, ["strict", "True or False", "got 'yes'", "Pass a bool"]),
    ({"skip_nonfinite": []}, ["skip_nonfinite", "True or False", "got []", "Pass a bool"]),
    ({"stochastic_rounding": None}, ["stochastic_rounding", "True or False", "got None"]),
    ({"maximize": "no"}, ["maximize", "True or False", "got 'no'", "Pass a bool"]),
    ({"seed": 2**63}, ["seed", "64 bits", str(2**63)]),
    ({"seed": 0.5}, ["seed", "whole number", "got 0.5"]),
    (
        {"momentum": "blend", "sketch": "gaussian"},
        ["momentum='blend'", "A A^T", "sketch='gaussian'", "Use sketch='hadamard'"],
    ),
    (
        {"momentum": "blend", "transfer": "paper"},
        ["momentum='blend'", "transfer='paper'", "amplifies", "Use transfer='shrink'"],
    ),
]
# Not keyword arguments of the constructor, but a group may hold them.
BAD_KEYS: list[tuple[dict[str, Any], list[str]]] = [
    ({"kapa": 5}, ["parameter group", "unknown key", "'kapa'", "Did you mean 'kappa'"]),
    ({"weight_decy": 0.1}, ["unknown key", "'weight_decy'", "Did you mean 'weight_decay'"]),
    ({"betas": (0.9,)}, ["betas must be (beta1, beta2)", "got (0.9,)", "Pass two numbers"]),
    ({"betas": (0.9, 0.99), "beta1": 0.8}, ["betas says", "beta1=0.8", "Leave one"]),
    ({"capturable": True}, ["cannot be capturable", "capturable=False"]),
    ({"rnak": 4}, ["unknown key", "'rnak'", "Did you mean 'rank'"]),
]


def _label(case: object) -> str:
    return "-".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else ""


def _refused_by_a_live_optimizer(
    words: list[str],
    action: Callable[[Flora, runs.Parameters], Any],
    kind: type[Exception] = ValueError,
) -> None:
    """The error, that nothing has changed, and that the run goes on as if nothing had been."""
    parameters, optimizer = runs.trained(2)
    before = runs.everything(optimizer)
    runs.assert_refused(words, lambda: action(optimizer, parameters), kind)
    runs.assert_equal(before, runs.everything(optimizer))
    runs.train(optimizer, parameters, range(2, 5))
    runs.assert_equal(runs.values(parameters), runs.expected_run(range(5)))


@pytest.mark.parametrize(("bad", "words"), BAD_SETTINGS, ids=_label)
def test_the_constructor_refuses_a_bad_setting_and_says_why(
    bad: dict[str, Any], words: list[str]
) -> None:
    weight = runs.build()["wide"]
    before = weight.detach().clone()
    runs.assert_refused(words, lambda: Flora([("wide", weight)], **bad))
    runs.assert_equal(weight.detach(), before)


@pytest.mark.parametrize(("bad", "words"), [*BAD_SETTINGS, *BAD_KEYS], ids=_label)
def test_a_refused_group_leaves_a_running_optimizer_as_it_was(
    bad: dict[str, Any], words: list[str]
) -> None:
    extra = nn.Parameter(torch.ones(4, 16, dtype=torch.float64))

    def add(optimizer: Flora, _: runs.Parameters) -> None:
        optimizer.add_param_group({"params": [("extra", extra)], **bad})

    _refused_by_a_live_optimizer(words, add)


@pytest.mark.parametrize(("bad", "words"), BAD_KEYS, ids=_label)
def test_the_constructor_refuses_a_group_key_that_is_nearly_a_setting(
    bad: dict[str, Any], words: list[str]
) -> None:
    group = {"params": [nn.Parameter(torch.ones(4, 16))], **bad}
    runs.assert_refused(words, lambda: Flora([group]))


def test_a_bad_default_is_refused_even_where_every_group_overrides_it() -> None:
    group = {"params": [nn.Parameter(torch.ones(4, 64))], "rank": 4}
    runs.assert_refused(["rank", "got 0", "None"], lambda: Flora([group], rank=0))


def test_a_group_may_carry_tags_of_its_own() -> None:
    weight = nn.Parameter(torch.ones(4, 64))
    optimizer = Flora([{"params": [weight], "name": "trunk", "layer": 3, "min_lr": 1e-5}])
    weight.grad = torch.ones(4, 64)
    optimizer.step()
    assert optimizer.param_groups[0]["name"] == "trunk"
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rank": 0}, ["rank", "got 0"]),
        ({"rank": 1}, ["momentum", "'wide'", "local shape", "Use the rank, block"]),
        ({"block": 16}, ["momentum", "'wide'", "local shape", "Use the rank, block"]),
        (
            {"momentum": "none"},
            ["'wide'", "must hold", "momentum, growth and a relative lr cannot change"],
        ),
        ({"sketch": "gaussian"}, ["'wide'", "sketch='gaussian'", "'hadamard'", "settings"]),
        ({"seed": 5}, ["'wide'", "seed=5", "it has 0", "settings of the run"]),
        ({"transfer": "papr"}, ["transfer", "Did you mean 'paper'"]),
    ],
    ids=_label,
)
def test_a_setting_that_state_does_not_fit_stops_the_step_until_it_is_put_back(
    bad: dict[str, Any], words: list[str]
) -> None:
    parameters, optimizer = runs.trained(2)
    group = optimizer.param_groups[0]
    good = {key: group[key] for key in bad}
    runs.set_gradients(parameters, 2)
    group.update(bad)
    before = runs.everything(optimizer)
    runs.assert_refused(words, optimizer.step)
    runs.assert_equal(before, runs.everything(optimizer))
    group.update(good)
    runs.train(optimizer, parameters, range(2, 5))
    runs.assert_equal(runs.values(parameters), runs.expected_run(range(5)))


def test_hadamard_over_whole_rows_needs_a_power_of_two_and_gaussian_does_not() -> None:
    weight = nn.Parameter(torch.ones(2000, 1376))

    def make(sketch: str) -> Flora:
        return Flora([("down", weight)], rank=4, block="full", sketch=sketch, momentum="flora")

    words = ["hadamard", "power of two", "'down'", "1376", "Pass block=64"]
    runs.assert_refused(words, lambda: make("hadamard"))
    for sketch in ("gaussian", "rademacher"):
        row = make(sketch).report().rows[0]
        assert row.is_compressed
        assert "4 per block of 1376" in row.how
    optimizer = make("gaussian")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["momentum"].shape == (2000, 1, 4 + 2)  # and a scale
    assert bool((weight < 1).all())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({nn.Parameter(torch.ones(2, 2))}, ["order", "equal on all ranks", "set", "Pass a list"]),
        (frozenset([nn.Parameter(torch.ones(2))]), ["order", "set", "Pass a list"]),
        ([{"params": {nn.Parameter(torch.ones(2))}}], ["order", "got a set", "Pass a list"]),
        (nn.Parameter(torch.ones(2, 2)), ["params", "iterable", "one tensor", "named_parameters"]),
    ],
    ids=["set", "frozenset", "set in a group", "bare tensor"],
)
def test_what_has_no_order_or_is_no_collection_is_refused(params: Any, words: list[str]) -> None:
    runs.assert_refused(words, lambda: Flora(params), TypeError)


def test_no_parameters_at_all_is_refused_as_in_torch() -> None:
    """``model.parameters()`` used up by someone else would train nothing, silently."""
    model = nn.Linear(4, 4)
    used_up = model.parameters()
    list(used_up)
    for params in ([], used_up):
        runs.assert_refused(["empty"], lambda params=params: Flora(params))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(4, 16, dtype=torch.int64), "torch.int64"),
        (torch.ones(4, 16, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(4, dtype=torch.bool), "torch.bool"),
    ],
)
def test_parameters_that_are_not_real_floating_point_are_refused(tensor: Tensor, kind: str) -> None:
    words = ["real floating-point", "'odd'", kind, "Leave it out"]
    runs.assert_refused(words, lambda: Flora([("odd", tensor)]))
    _refused_by_a_live_optimizer(
        words, lambda optimizer, _: optimizer.add_param_group({"params": [("odd", tensor)]})
    )


def test_two_parameters_with_one_canonical_name_are_refused() -> None:
    one, other = (nn.Parameter(torch.ones(4, 16, dtype=torch.float64)) for _ in range(2))
    words = ["names must differ", "'layer.weight'", "two parameters", "Rename one"]
    named = [("layer.weight", one), ("module.layer.weight", other)]
    runs.assert_refused(words, lambda: Flora(named))
    groups = [{"params": [named[0]]}, {"params": [named[1]]}]
    runs.assert_refused(words, lambda: Flora(groups))
    _refused_by_a_live_optimizer(
        ["names must differ", "'wide'", "Rename one"],
        lambda optimizer, _: optimizer.add_param_group({"params": [("_orig_mod.wide", other)]}),
    )


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    def step(optimizer: Flora, parameters: runs.Parameters) -> None:
        runs.set_gradients(parameters, 2)
        parameters["wide"].grad = draw_sparse(parameters["wide"])
        optimizer.step()

    def draw_sparse(weight: Tensor) -> Tensor:
        return runs.draw("wide", 2, weight.shape, weight.dtype).to_sparse()

    words = ["gradients must be dense", "'wide'", "sparse", "sparse=False"]
    _refused_by_a_live_optimizer(words, step)


def test_a_sparse_gradient_at_the_first_step_leaves_no_state() -> None:
    embedding = nn.Embedding(10, 16, sparse=True)
    optimizer = Flora(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = runs.everything(optimizer)
    runs.assert_refused(["'weight'", "sparse=False"], optimizer.step)
    runs.assert_equal(before, runs.everything(optimizer))


@pytest.mark.parametrize("name", ["capturable", "differentiable"])
def test_what_a_step_cannot_do_is_refused_by_name(name: str) -> None:
    words = [f"cannot be {name}", f"pass {name}=False"]
    runs.assert_refused(words, lambda: Flora(runs.build().items(), **{name: True}))


def test_the_constructor_takes_what_frameworks_pass_to_torchs_optimizers() -> None:
    parameters = runs.build()
    passed = {"foreach": True, "fused": False, "capturable": False, "differentiable": False}
    optimizer = Flora(parameters.items(), **runs.SETTINGS, **passed)
    runs.train(optimizer, parameters, range(4))
    runs.assert_equal(runs.values(parameters), runs.expected_run(range(4)))


def test_betas_are_beta1_and_beta2() -> None:
    finals = []
    for given in ({"betas": (0.8, 0.95)}, {"betas": [0.8, 0.95]}, {"beta1": 0.8, "beta2": 0.95}):
        for place in ("constructor", "group"):
            parameters = runs.build()
            first, *rest = parameters.items()
            if place == "constructor":
                optimizer = Flora([first, *rest], **runs.SETTINGS, **given)
            else:
                optimizer = Flora([{"params": [first], **given}], **runs.SETTINGS)
                optimizer.add_param_group({"params": rest, **given})
            runs.train(optimizer, parameters, range(4))
            finals.append(runs.values(parameters))
    for final in finals[1:]:
        runs.assert_equal(final, finals[0])
    words = ["betas says", "beta1=0.7", "Leave one"]
    runs.assert_refused(words, lambda: Flora(parameters.items(), betas=(0.8, 0.95), beta1=0.7))
    words = ["betas must be (beta1, beta2)", "got 0.9"]
    runs.assert_refused(words, lambda: Flora(parameters.items(), betas=0.9))  # type: ignore[arg-type]


def test_strict_refuses_a_matrix_that_would_silently_be_dense() -> None:
    parameters = runs.build()
    words = ["strict=True", "'narrow'", "(9, 3)", "would be dense", "rank=None"]
    refused = functools.partial(Flora, **runs.SETTINGS, strict=True)
    runs.assert_refused(words, lambda: refused(parameters.items()))


def test_strict_switched_on_later_refuses_at_the_next_step() -> None:
    parameters = runs.build()
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    optimizer.param_groups[0]["strict"] = True
    runs.set_gradients(parameters, 0)
    before = runs.everything(optimizer)
    words = ["strict=True", "'narrow'", "(9, 3)", "would be dense", "rank=None"]
    runs.assert_refused(words, optimizer.step)
    runs.assert_refused(words, optimizer.report)
    runs.assert_equal(before, runs.everything(optimizer))


def test_strict_accepts_vectors_and_groups_that_are_dense_on_purpose() -> None:
    parameters = runs.build()
    narrow = [("narrow", parameters.pop("narrow"))]
    groups = [{"params": parameters.items()}, {"params": narrow, "rank": None}]
    optimizer = Flora(groups, **runs.SETTINGS, strict=True)
    runs.train(optimizer, parameters, range(1))
    assert {row.name for row in optimizer.report().rows if not row.is_compressed} == {
        "narrow",
        "bias",
        "scale",
    }
