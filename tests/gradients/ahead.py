# SPDX-License-Identifier: Apache-2.0
"""What ranks do whose sketches are sent during backward, and what goes wrong meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.gradients.faults import broken
from tests.gradients.small import WIDTH, attached, my_inputs, on_ddp, refused

TINY = 1e-6
"""MiB: each of the three matrices in a message of its own, two of them during backward."""
TWO = 1e-3
"""MiB: two matrices in the first message, one in the other."""
FEW: dict[str, Any] = {"gradient_bits": 4}


class Run:
    """Small under DDP."""

    def __init__(self, cap: float | None) -> None:
        self.ddp, self.model = on_ddp()
        more = {} if cap is None else {"bucket_cap_mb": cap}
        self.optimizer, self.handle = attached(self.ddp, **FEW, **more)

    @property
    def is_under_way(self) -> bool:
        return self.handle.gradients._is_under_way

    def backward(self, step: int, micro_batches: int = 1, **options: bool) -> None:
        for number, x in enumerate(my_inputs(step, 24).chunk(micro_batches), start=1):
            with self._sync(number == micro_batches):
                (self.ddp(x, **options) / micro_batches).backward()

    def _sync(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self.ddp.no_sync()  # type: ignore[operator]

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def alike(one: Run, other: Run) -> bool:
    """Whether every bit of the weights is the same."""
    return all(map(torch.equal, one.weights(), other.weights()))


def without_a_gradient() -> tuple[bool, bool]:
    """Parameters that are unused on all ranks, then on one; whether as in one message."""
    runs = [Run(TINY), Run(None)]
    for step, is_used in enumerate((True, False, dist.get_rank() == 0)):
        for run in runs:
            run.backward(step, micro_batches=2, use_extra=is_used)
            run.step()
    return alike(*runs), not runs[0].is_under_way


class Twins(nn.Module):
    """Two matrices whose gradients come in the order that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(WIDTH, 24, bias=False) for _ in "ab")
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor, first: str) -> Tensor:
        second = "b" if first == "a" else "a"
        there = {name: getattr(self, name)(x) for name in (first, second)}
        return self.norm(there["a"] * there["b"]).square().mean()


def in_another_order() -> tuple[bool, bool]:
    """Ranks whose gradients come in opposite orders: as in one message; whether orders differed."""
    weights, under_way = [], True
    for more in ({"bucket_cap_mb": TINY}, {}):
        model = Twins()
        ddp = DistributedDataParallel(model)
        optimizer, handle = attached(ddp, **FEW, **more)
        for step in range(3):
            ddp(my_inputs(step), "ab"[(dist.get_rank() + step) % 2]).backward()
            if more:
                under_way &= handle.gradients._is_under_way
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    return all(map(torch.equal, *weights)), under_way


# ---- what fails


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(*_: Any) -> Any:
        raise ArithmeticError("a backward that fails")


def _fail(run: Run, where: str) -> None:
    """A backward that fails as it comes to a module."""
    module = getattr(run.model, where)
    hook = module.register_forward_hook(lambda _, __, output: _Failing.apply(output))
    refused(lambda: run.backward(9), ArithmeticError)
    hook.remove()


def after_a_failure() -> dict[str, bool]:
    """Steps after a backward that failed with a message under way, beside those in one message.

    Both runs fail: DDP's own reducer goes on to reduce in the next no_sync() after it has.
    """
    found = {}
    for forget in ("optimizer", "model"):
        run, other = Run(TINY), Run(None)
        for step in range(3):
            for each in (run, other):
                if step == 1:
                    _fail(each, "extra")  # the last matrix has come, and in its bucket been sent
                    found[f"{forget}: {each is run}"] = each.is_under_way == (each is run)
                    (each.optimizer if forget == "optimizer" else each.model).zero_grad()
                each.backward(step, micro_batches=4)
                each.step()
        found[f"{forget}: the same"] = alike(run, other)
    return found


def on_one_rank_alone() -> str:
    """Rank 0 drops what it has sent, and rank 1 asks for the mean: its error."""
    run = Run(TINY)
    if dist.get_rank() == 0:
        _fail(run, "extra")
        run.optimizer.zero_grad()
        run.handle.gradients.forget()
        return ""
    with run.ddp.no_sync():  # type: ignore[operator]
        run.backward(0)
    return refused(run.handle.gradients.reduce, RuntimeError)


def _accumulating(run: Run) -> None:
    run.backward(0)
    run.backward(1)


def _zeroed_in_part(run: Run) -> None:
    run.backward(0)
    run.model.last.weight.grad = None
    run.optimizer.step()


def _adding(run: Run) -> None:
    run.backward(0)
    gradient = run.model.last.weight.grad
    assert gradient is not None
    gradient += torch.ones(gradient.shape)


def _too_early(run: Run) -> None:
    with broken("one gradient too early"):
        run.backward(0)


MISUSED: dict[str, tuple[float, Callable[[Run], None]]] = {
    "accumulating": (TINY, _accumulating),
    "adding": (TINY, _adding),
    "zeroed in part": (TINY, _zeroed_in_part),
    "too early": (TWO, _too_early),
}


def misused(how: str) -> str:
    """The error; what has been sent is taken back by all ranks."""
    cap, act = MISUSED[how]
    run = Run(cap)
    message = refused(lambda: act(run), RuntimeError)
    run.handle.remove()
    assert not run.is_under_way
    return message
