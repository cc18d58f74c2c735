# SPDX-License-Identifier: Apache-2.0
"""What a model over several processes is to the loop: forward, backward, step, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from flora_dist.flora import Flora
from flora_dist.gradients.report import GradientReport
from flora_dist.trainer.config import Config
from flora_dist.trainer.storage import Storage


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of this run, as one of them sees it."""

    process_rank: int
    """Number of this process, from 0; process 0 speaks and writes."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""

    @property
    def speaks(self) -> bool:
        """Whether this is the process that prints and writes the run's files."""
        return self.process_rank == 0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A model spread over the processes."""

    module: nn.Module
    """What is called: forward runs through it."""
    synchronising: Callable[[bool], AbstractContextManager[object]]
    """Context of one micro-batch; with False, gradients stay on the process."""
    arithmetic: Callable[[], AbstractContextManager[object]]
    """Context of a forward pass that sets its precision."""
    update: Callable[[torch.optim.Optimizer, LambdaLR], None]
    """Clip the gradient if asked to, step, clear the gradient, move the learning rate."""
    norm: Callable[[torch.optim.Optimizer], float | None]
    """Norm of the whole gradient before clipping; every process calls it. None: nobody knows it."""
    weights: Callable[[], Sequence[torch.Tensor]]
    """Tensors of weights on this process; an engine's float32 masters too."""
    trained: Callable[[], Sequence[torch.Tensor]]
    """Those of them that the optimizer steps on this process."""
    backward: Callable[[torch.Tensor], object] = torch.autograd.backward
    """Add the gradient of a micro-batch's loss."""
    free: Callable[[], None] = lambda: None
    """Free whole weights that a forward pass without a backward pass has left behind."""
    close: Callable[[], None] = lambda: None
    """Let go of what outlives the model."""
    norm_comes_late: bool = False
    """Whether `norm` is known after `update` alone, which an engine's is; else before it alone."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model over the processes, and what trains it."""

    spread: Spread
    """The model."""
    optimizer: torch.optim.Optimizer
    """The optimizer that holds the state, without an engine's wrapper."""
    scheduler: LambdaLR
    """Its learning rate."""
    gradients: GradientReport | None
    """What of the gradients is sketched; None: nothing."""
    storage: Storage
    """How both are saved and loaded."""


def over(
    owner: nn.Module,
    config: Config,
    *,
    module: nn.Module,
    synchronising: Callable[[bool], AbstractContextManager[object]],
    arithmetic: Callable[[], AbstractContextManager[object]],
    clip: Callable[[float], object] | None = None,
    free: Callable[[], None] = lambda: None,
) -> Spread:
    """A Spread whose weights are the parameters of `owner`, stepped by a plain optimizer."""
    # Taken now: FSDP1 hides its parameters between a forward and a backward pass.
    parameters = list(owner.parameters())
    most = config.train.max_grad_norm
    theirs = clip or (lambda norm: nn.utils.clip_grad_norm_(parameters, norm))

    def norm(optimizer: torch.optim.Optimizer) -> float:
        if isinstance(optimizer, Flora):
            return float(optimizer.grad_norm())
        found = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return float(found.full_tensor() if isinstance(found, DTensor) else found)

    def update(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
        if most is not None:
            # Flora's own, which also knows the norm of sketches.
            clip_ = optimizer.clip_grad_norm_ if isinstance(optimizer, Flora) else theirs
            clip_(most)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    return Spread(
        module=module,
        synchronising=synchronising,
        arithmetic=arithmetic,
        update=update,
        norm=norm,
        weights=lambda: [local_part(p) for p in parameters],
        trained=lambda: [local_part(p) for p in parameters if p.requires_grad],
        free=free,
    )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def autocast(config: Config, world: World) -> Callable[[], AbstractContextManager[object]]:
    """The context of a forward pass: it lowers the precision of weights in float32."""
    if config.train.precision != "bfloat16":
        return nullcontext
    return lambda: torch.autocast(world.device.type, dtype=torch.bfloat16)
