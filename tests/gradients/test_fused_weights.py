# SPDX-License-Identifier: Apache-2.0
"""Fused layers whose weight is not the attached one at forward time, or has a hook.

The judge is `compressed`, which lets autograd do all of it. In float64 the sketches differ by the
order of a few hundred sums: 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import flora_dist
from flora_dist import Flora
from flora_dist.gradients.attach import Handle
from flora_dist.gradients.placeholder import stands_in
from tests.conftest import launched_pool_of, pool_of
from tests.gradients import small
from tests.gradients.small import SETTINGS, Small, attached, formed
from tests.zero.small import batch, config_of, start

EQUAL = 1e-12
WIDTH = 24


class Stack(nn.Module):
    """Layers of one shape, so that any may have another's weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.c = Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh()).square().mean()


def other_weights() -> dict[str, Tensor]:
    """Leaves of their own for every parameter."""
    named = Stack(seed=1).double().named_parameters()
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in named}


X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _leaves(found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {f"other {name}": leaf.grad for name, leaf in found.items()}


def substituted(model: Stack, names: tuple[str, ...]) -> dict[str, Any]:
    chosen = {n: w for n, w in other_weights().items() if n in names or not names}
    functional_call(model, chosen, (X,)).backward()
    return _leaves(chosen)


def computed(model: Stack) -> dict[str, Any]:
    """Functions of the model's own weights in their place."""
    changed = {n: 0.5 * p + p.detach().square() for n, p in model.named_parameters()}
    (functional_call(model, changed, (X,)) + model(X)).backward()
    return {}


def own(model: Stack) -> dict[str, Any]:
    functional_call(model, dict(model.named_parameters()), (X,)).backward()
    return {}


def assigned(model: Stack) -> dict[str, Any]:
    leaf = nn.Parameter(other_weights()["a.weight"].detach())
    model.a.weight = leaf
    model(X).backward()
    return _leaves({"a": leaf})


def plain_tensor(model: Stack) -> dict[str, Any]:
    leaf = other_weights()["a.weight"]
    del model.a._parameters["weight"]
    model.a.weight = leaf
    model(X).backward()
    return _leaves({"a": leaf})


def tied_later(model: Stack) -> dict[str, Any]:
    model.b.weight = model.a.weight
    model(X).backward()
    return {}


def tied_across_kinds(model: Stack) -> dict[str, Any]:
    model.c.weight = model.a.weight
    model(X).backward()
    return {}


def exchanged(model: Stack) -> dict[str, Any]:
    model.a.weight, model.b.weight = model.b.weight, model.a.weight
    model(X).backward()
    return {}


def pruned(model: Stack) -> dict[str, Any]:
    torch.manual_seed(0)
    prune.random_unstructured(model.a, "weight", 0.5)
    model(X).backward()
    return {}


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


def parametrized(model: Stack) -> dict[str, Any]:
    parametrize.register_parametrization(model.a, "weight", Symmetric())
    model(X).backward()
    return {}


def normed(model: Stack) -> dict[str, Any]:
    parametrizations.weight_norm(model.b)
    model(X).backward()
    return {}


def taught(model: Stack) -> dict[str, Any]:
    """A teacher's pass with swapped weights, inside of the student's graph."""
    teacher = other_weights()
    with torch.no_grad():
        target = functional_call(model, teacher, (X,))
    (model(X) - target + functional_call(model, teacher, (X,))).backward()
    return _leaves(teacher)


def swapped(model: Stack) -> dict[str, Any]:
    """As some averages of weights do it."""
    leaf, mine = other_weights()["b.weight"], model.b._parameters["weight"]
    model.b._parameters["weight"] = leaf  # type: ignore[assignment]
    loss = model(X)
    model.b._parameters["weight"] = mine
    (loss + model(X)).backward()
    return _leaves({"b": leaf})


def other_data(model: Stack) -> dict[str, Any]:
    model.a.weight.data = other_weights()["a.weight"].data
    model(X).backward()
    return {}


def recomputed(model: Stack) -> dict[str, Any]:
    chosen = other_weights()

    def middle(x: Tensor) -> Tensor:
        return functional_call(model, chosen, (x,))

    checkpoint(middle, X.clone().requires_grad_(), use_reentrant=False).backward()
    return _leaves(chosen)


def ensemble(model: Stack) -> dict[str, Any]:
    stacked, _ = stack_module_state([Stack(seed).double() for seed in (1, 2)])
    vmap(lambda weights: functional_call(model, weights, (X,)))(stacked).sum().backward()
    return _leaves(stacked)


def gradients_by_func(model: Stack) -> dict[str, Any]:
    found: dict[str, Any] = torch.func.grad(lambda w: functional_call(model, w, (X,)))(
        {n: p.detach() for n, p in model.named_parameters()}
    )
    return found


def transformed_inputs(model: Stack) -> dict[str, Any]:
    """The model's own weights, under torch.func."""
    vmap(model)(X).sum().backward()
    return {"x": torch.func.grad(model)(X)}


def compiled(model: Stack) -> dict[str, Any]:
    chosen = other_weights()
    call = torch.compile(lambda weights: functional_call(model, weights, (X,)), backend="aot_eager")
    call(dict(model.named_parameters())).backward()
    call(chosen).backward()
    return _leaves(chosen)


def compiled_before(model: Stack) -> dict[str, Any]:
    call = torch.compile(model, backend="aot_eager")
    call(X).backward()
    found = assigned_to(model, "b")
    call(X).backward()
    return _leaves(found)


def assigned_to(model: Stack, layer: str) -> dict[str, Tensor]:
    leaf = nn.Parameter(other_weights()[f"{layer}.weight"].detach())
    model.get_submodule(layer).weight = leaf
    return {layer: leaf}


WAYS: dict[str, Callable[[Stack], dict[str, Any]]] = {
    "functional_call": lambda model: substituted(model, ()),
    "functional_call of one weight": lambda model: substituted(model, ("a.weight",)),
    "functional_call of a bias": lambda model: substituted(model, ("a.bias",)),
    "computed": computed,
    "its own": own,
    "assigned": assigned,
    "a plain tensor": plain_tensor,
    "tied later": tied_later,
    "tied across kinds": tied_across_kinds,
    "exchanged": exchanged,
    "pruned": pruned,
    "parametrized": parametrized,
    "normed": normed,
    "taught": taught,
    "swapped": swapped,
    "other data": other_data,
    "recomputed": recomputed,
    "ensemble": ensemble,
    "gradients by torch.func": gradients_by_func,
    "inputs under torch.func": transformed_inputs,
    "compiled": compiled,
    "compiled before": compiled_before,
}


def gradients_of(way: Callable[[Stack], dict[str, Any]], level: str) -> dict[str, Tensor]:
    """Everything that has a gradient then: leaves beside the model, its dense ones, sketches."""
    model = Stack().double()
    _, handle = attached(model, level)
    found = {name: gradient for name, gradient in way(model).items() if gradient is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not stands_in(parameter.grad):
            found[f"dense {name}"] = parameter.grad
    return {**found, **sums_of(handle)}


def sums_of(handle: Handle) -> dict[str, Tensor]:
    pairs = ((n, f.accumulator.sums_ENKR) for n, f in handle.gradients.flows.items())
    return {f"sketches of {name}": sums for name, sums in pairs if sums is not None}


@pytest.mark.parametrize("name", WAYS)
def test_a_weight_that_is_not_the_attached_one_gets_its_own_gradient(name: str) -> None:
    # Substitutes got none and the model's own weights received theirs: 0.74 off.
    wanted, got = (gradients_of(WAYS[name], level) for level in ("compressed", "fused"))
    assert got.keys() == wanted.keys()
    assert wanted
    for key, value in wanted.items():
        assert (got[key] - value).norm() <= EQUAL * value.norm(), key


def test_functional_call_trains_what_it_is_given() -> None:
    model, chosen = Stack().double(), other_weights()
    _, handle = attached(model, "fused")
    functional_call(model, chosen, (X,)).backward()
    judge = Stack(seed=1).double()
    judge(X).backward()
    for name, parameter in judge.named_parameters():
        torch.testing.assert_close(chosen[name].grad, parameter.grad, rtol=EQUAL, atol=EQUAL)
    assert not sums_of(handle)


def test_layers_that_have_their_own_weight_again_are_fused_again() -> None:
    model = Stack().double()
    _optimizer, _ = attached(model, "fused")
    with formed() as names:
        substituted(model, ())
        swapped(model)
        own(model)
        model(X).backward()
    assert not names


def test_data_parallel_is_refused() -> None:
    model = nn.DataParallel(Small())
    model.device_ids = [0, 1]  # as on two devices
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    with pytest.raises(ValueError, match="DataParallel copies layers"):
        flora_dist.attach(model, optimizer, "fused")
    flora_dist.attach(model, optimizer, "compressed")


# ---- hosts whose weights are not what modules hold outside of forward


def formed_on(host: str) -> tuple[set[str], set[str]]:
    """Weights whose gradients are formed over two micro-batches, and those said not to be."""
    wrapped, _ = small.HOSTS[host]()
    _, handle = attached(wrapped, "fused")
    with formed() as names:
        for _ in range(2):
            wrapped(small.my_inputs(0)).backward()
    return set(names), {row.name for row in handle.report().rows if row.how.startswith("fused")}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("host", small.HOSTS)
def test_layers_of_a_host_stay_fused(host: str) -> None:
    # A layer that is an FSDP2 unit itself is of a class of its own, and the report says so.
    others = {"first.weight"} if host == "fsdp2" else set()
    matrices = {"first.weight", "extra.weight", "last.weight"}
    for names, fused in pool_of(2)(formed_on, host):
        assert (names, fused) == (others, matrices - others)


def formed_in_an_engine(stage: int) -> list[str]:
    engine, _ = start(config_of(stage, flora={"gradients": "fused"}))
    with formed() as names:
        for micro in range(2):
            engine.backward(engine(batch(micro)))
            engine.step()
    engine.destroy()
    return names


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layers_of_an_engine_stay_fused(stage: int) -> None:
    assert launched_pool_of(2)(formed_in_an_engine, stage) == [[], []]
