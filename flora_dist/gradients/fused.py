# SPDX-License-Identifier: Apache-2.0
"""Sketched linear layers in a model: which modules fit, their carriers, and A of the coming step.

A layer whose weight is another tensor than the one attached, at the time of a forward, runs its own
forward then: substituted (functional_call), assigned, tied, masked, parametrized. So does one whose
weight has got a hook, which waits for the gradient. What of the attached weight's gradient comes
about there arrives by the hook on full gradients.

The model's parameters, hooks and state_dict stay as they are. A is changed in place and outside of
forward: torch.compile would else compile anew at every step. Shape suffixes: N rows, K blocks, R
rank, B block.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from flora_dist.core.layouts.replicated import whole
from flora_dist.gradients.cycle import Gradients
from flora_dist.gradients.flow import Flow
from flora_dist.gradients.fused_linear import SketchedConv1D, SketchedLinear

_CONV1D_HOME = "transformers.pytorch_utils"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FusedWeight:
    """A parameter whose gradient linear layers may take as a sketch."""

    flow: Flow
    tensor: Any
    """What stands in its modules while they compute: the parameter, or what it is gathered to."""
    hooks: frozenset[int]
    """Of those after accumulation on ``tensor``, the ones that can do without a gradient."""

    @property
    def is_watched(self) -> bool:
        """Whether somebody's hook waits for the gradient."""
        after = self.tensor._post_accumulate_grad_hooks or ()
        return bool(self.tensor._backward_hooks) or not self.hooks.issuperset(after)


def fuse(model: nn.Module, gradients: Gradients, weights: Mapping[int, FusedWeight]) -> Fused:
    """Let every linear layer that fits take its weight's gradient as a sketch.

    Fits: nn.Linear and transformers' Conv1D, not their subclasses, with a whole weight.

    Args:
        model: whose modules are looked at, after sharding.
        gradients: takes the sketches. Hooks on full gradients must be there beside this: what does
            not fit, and weights that are read outside of their modules, arrive by these.
        weights: by ``id()`` of the parameter as it stands in its module now.
    """
    carriers: dict[str, _Carrier] = {}
    forwards: list[_Forward] = []
    where: dict[str, list[str]] = {each.flow.part.name: [] for each in weights.values()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in weights:
                continue
            earlier = module.__dict__.get("forward")
            if isinstance(earlier, _Forward) and earlier.has_ended:
                earlier.remove()
            weight = weights[id(parameter)]
            of = weight.flow.part.name
            because = _misfit(module, name, weight)
            where[of].append(f"compressed: {because}" if because else "fused")
            if not because:
                if of not in carriers:
                    carriers[of] = _Carrier(gradients, weight)
                forwards.append(_Forward(module, carriers[of]))
    found = {name: "; ".join(sorted(set(words), reverse=True)) for name, words in where.items()}
    fused = Fused(carriers, forwards, found)
    if carriers:
        gradients.on_forget(fused.refresh)
    return fused


class Fused:
    """The sketched linear layers of one model."""

    def __init__(
        self,
        carriers: Mapping[str, _Carrier],
        forwards: Sequence[_Forward],
        where: Mapping[str, str],
    ) -> None:
        """Made by ``fuse``."""
        self._carriers, self._forwards = carriers, forwards
        self.where = where
        """By parameter: "fused", "compressed: " and why, or both where modules share it."""

    @property
    def names(self) -> frozenset[str]:
        """Parameters with a module that does not form their gradient."""
        return frozenset(self._carriers)

    def refresh(self) -> None:
        """Make A that of the coming step; for whoever changes that other than by a step."""
        for carrier in self._carriers.values():
            carrier.refresh()

    def remove(self) -> None:
        """Every module runs its own forward again."""
        for forward in self._forwards:
            forward.remove()
        for carrier in self._carriers.values():
            carrier.close()


def _functions() -> dict[type[nn.Module], Any]:
    """What runs in place of a module's forward; transformers is not imported for it."""
    found: dict[type[nn.Module], Any] = {nn.Linear: SketchedLinear}
    if _CONV1D_HOME in sys.modules:
        found[sys.modules[_CONV1D_HOME].Conv1D] = SketchedConv1D
    return found


def _misfit(module: nn.Module, name: str, weight: FusedWeight) -> str:
    """Why a module forms the gradient of its parameter; empty if it need not."""
    kind = type(module).__name__
    if type(module) not in _functions() or name != "weight":
        return f"{name} of {kind}"
    if "forward" in module.__dict__:
        return f"{kind} whose forward was replaced"
    if weight.flow.accumulator.tile not in whole(weight.flow.geometry.shape):
        return f"{kind} with a part of its weight"
    if weight.is_watched:
        return f"{kind} with a hook on its weight"
    return ""


class _Carrier:
    """One parameter's sketches on their way out of autograd, and what they are made with."""

    def __init__(self, gradients: Gradients, weight: FusedWeight) -> None:
        accumulator = weight.flow.accumulator
        # Weak, as the hook: torch holds modules and leaves where the collector does not look.
        self._gradients, self._weight = ref(gradients, partial(_end, ref(self))), weight
        self.has_ended = False
        """Whether the gradients are gone, with their optimizer."""
        zero = torch.zeros((), dtype=accumulator.dtype, device=accumulator.device)
        self.zeros_NKR = zero.expand(accumulator.sums_shape[1:]).requires_grad_()  # no memory
        # Scaled by a power of two, so that raw sketches are as large as the gradient in fp16 too.
        shrink = 2.0 ** -(accumulator.block.bit_length() // 2)
        self.unit_RB = zero.new_zeros(accumulator.rank, accumulator.block)
        """A over ``scale``: exact in bfloat16."""
        self.scale = accumulator.entry_scale / shrink
        self._step = 0
        self.refresh()
        leaf: Any = self.zeros_NKR  # torch's method has no types
        self._hook = leaf.register_post_accumulate_grad_hook(partial(_hand_over, ref(self)))

    @torch.no_grad()
    def refresh(self) -> None:
        """Make A that of the coming step."""
        accumulator = self._weight.flow.accumulator
        if self._step == accumulator.next_step:
            return
        (sketch_RB,) = accumulator.sketch(self.unit_RB.device)
        shrink = accumulator.entry_scale / self.scale
        # Rounding to bfloat16 takes the rounding of the scale out again.
        entries_RB = (sketch_RB / accumulator.entry_scale).to(torch.bfloat16)
        self.unit_RB.copy_(entries_RB * shrink)
        self._step = accumulator.next_step

    @torch.no_grad()
    def take(self, sketched_NKR: Tensor) -> None:
        """Give a sketch that has arrived to the gradients."""
        flow = self._weight.flow
        if self._weight.is_watched:  # since forward, or since it was compiled
            raise RuntimeError(
                "a hook on a weight whose gradient is fused must be there before the forward, and "
                f"before it is compiled; {flow.part.name!r} has one that got None. Register it "
                'earlier, or attach with gradients="compressed".'
            )
        if (gradients := self._gradients()) is not None:
            gradients.take_sketch(flow, sketched_NKR, self._step)

    def serves(self, weight: Tensor) -> bool:
        """Whether a gradient of ``weight`` is the attached parameter's, and nobody waits for it.

        Not once the optimizer is gone: nobody would take it.
        """
        is_attached = weight is self._weight.tensor and not self.has_ended
        return is_attached and not self._weight.is_watched

    def end(self) -> None:
        """Leave weights to their modules."""
        self.has_ended = True

    def close(self) -> None:
        """Take nothing more."""
        self._hook.remove()


def _end(carrier: ref[_Carrier], _: object) -> None:
    if (alive := carrier()) is not None:
        alive.end()


def _hand_over(carrier: ref[_Carrier], zeros_NKR: Tensor) -> None:
    """The hook: a sketch has arrived in ``grad``."""
    sketched_NKR, zeros_NKR.grad = zeros_NKR.grad, None
    assert sketched_NKR is not None
    if (alive := carrier()) is not None:
        alive.take(sketched_NKR)


class _Forward:
    """Runs in place of a module's forward. A copy of the module has its own forward again."""

    def __init__(self, module: nn.Module, carrier: _Carrier) -> None:
        self._module, self._function = module, _functions()[type(module)]
        self._carrier: _Carrier | None = carrier
        module.forward = self

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """As the module's own; nn.Linear names its argument input, Conv1D x."""
        module, carrier = self._module, self._carrier
        (x,) = (*inputs, *named.values())
        weight: Any = module.weight
        is_trained = torch.is_grad_enabled() and weight.requires_grad
        # torch.func takes no function like ours through its transforms.
        if carrier is None or not is_trained or not carrier.serves(weight) or _is_transformed():
            return type(module).forward(module, x)
        kind, is_double = x.device.type, torch.float64 in (x.dtype, weight.dtype)
        casts = torch.is_autocast_enabled(kind) and not is_double
        if casts:
            x = x.to(torch.get_autocast_dtype(kind))
        elif x.dtype != weight.dtype:
            return type(module).forward(module, x)  # raises
        # Casts in there would be kept by autocast without their gradient, for others to use.
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            return self._function.apply(
                x, weight, module.bias, carrier.zeros_NKR, carrier.unit_RB, carrier.scale
            )

    @property
    def has_ended(self) -> bool:
        """Whether nobody would take a sketch any more."""
        return self._carrier is None or self._carrier.has_ended

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which know nothing of the optimizer."""
        return _own_forward, (self._module,)

    def remove(self) -> None:
        """Run the module's own forward from here on, also for who has kept this."""
        self._carrier = None
        if self._module.__dict__.get("forward") is self:
            del self._module.forward


def _is_transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _own_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)
