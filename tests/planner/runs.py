# SPDX-License-Identifier: Apache-2.0
"""Training runs that the planner is held against: a model of configs/model on one backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import flora_dist
from flora_dist import Flora
from flora_dist.cluster.planner.request import PURE

MODELS = Path(__file__).parents[2] / "configs" / "model"
BLOCK = 64
BUCKET = 20_000_000
"""Elements of ZeRO's buckets: more than any parameter here has, as with DeepSpeed's 500 million,
which would be all that is seen of a small model's peak."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run; every rank has the same."""

    model: str
    """A file of configs/model."""
    backend: str
    """A key of ``BACKENDS``."""
    ratio: int
    """Of the momentum, and of gradients where they are sketched."""
    gradients: str = "dense"
    gradient_bits: int = 32
    """Below 32: of all numbers of a block, whatever the ratio."""
    gradient_rank: int | None = None
    """Numbers of a block that are kept of gradients, where not as above."""
    accumulate: int = 1
    micro_batch: int = 2
    sequence_length: int = 32
    precision: str = "float32"
    momentum: str = "blend"

    def __str__(self) -> str:
        words = [self.model, self.backend, f"1/{self.ratio} {self.gradients}"]
        words += [f"{self.gradient_bits} bits"] if self.gradient_bits < 32 else []
        words += [f"{self.accumulate} micro-batches"] if self.accumulate > 1 else []
        words += ["bf16 alone"] if self.is_pure else ["bf16"] if self.is_low else []
        return ", ".join(words)

    @property
    def is_low(self) -> bool:
        """Whether forward and backward are in bfloat16."""
        return self.precision != "float32"

    @property
    def is_pure(self) -> bool:
        """Whether the weights themselves are, and there are no others."""
        return self.precision == PURE

    @property
    def rank(self) -> int:
        """Numbers per block."""
        return BLOCK // self.ratio

    def sketching(self) -> dict[str, Any]:
        """How many numbers of a block's gradient are kept, in how many bits."""
        kept = {"gradient_rank": self.gradient_rank, "gradient_bits": self.gradient_bits}
        return {name: value for name, value in kept.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Of the optimizer."""
        return {"lr": 1e-3, "rank": self.rank, "block": BLOCK, "momentum": self.momentum}

    def build(self) -> nn.Module:
        """The network, equal on all ranks."""
        model = build(MODELS / f"{self.model}.json")
        if self.is_pure:
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        return model


def build(path: Path) -> nn.Module:
    """The network in training, as transformers makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    settings = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: nn.Module = kind.from_config(config)
    return model.train()


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run goes on."""

    model: nn.Module
    optimizer: Flora
    masters: Callable[[], list[Tensor]]
    """What the optimizer steps instead of the model's own parameters."""
    loss: Callable[[Tensor, bool], Tensor]
    """Of a micro-batch; whether it is the last of its step."""
    backward: Callable[[Tensor, bool], None]
    step: Callable[[], None]
    close: Callable[[], None]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


# ---- backends


def _fsdp2(case: Case) -> Run:
    """As the trainer shards: each layer a unit, the root keeps what it gathered for forward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    low = torch.bfloat16 if case.is_low and not case.is_pure else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    model = case.build()
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return _own_loop(case, model, model)


def _ddp(case: Case) -> Run:
    model = case.build()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return _own_loop(case, model, wrapped)


def _own_loop(case: Case, model: nn.Module, wrapped: nn.Module) -> Run:
    optimizer = Flora(wrapped.named_parameters(), **case.settings())
    if case.gradients != "dense":
        flora_dist.attach(wrapped, optimizer, case.gradients, **case.sketching())

    def loss(tokens: Tensor, is_last: bool) -> Tensor:
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(is_last or case.gradients == "sharded")
        elif isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = is_last  # what no_sync() does
        return loss_of(wrapped, tokens) / case.accumulate

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Run(
        model=model,
        optimizer=optimizer,
        masters=list,
        loss=loss,
        backward=lambda loss, _: loss.backward(),
        step=step,
        close=lambda: None,
    )


def _zero(stage: int) -> Callable[[Case], Run]:
    return lambda case: _engine(case, stage)


def _engine(case: Case, stage: int) -> Run:
    import flora_dist.deepspeed

    config = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulate,
        "optimizer": {"type": "Flora", "params": case.settings()},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "bf16": {"enabled": case.is_low, "bf16_master_weights_and_grads": case.is_pure},
        "steps_per_print": 10**9,
    }
    if case.gradients != "dense":
        config["flora"] = {"gradients": case.gradients, **case.sketching()}
    model = case.build()
    engine, *_ = flora_dist.deepspeed.initialize(model=model, config=config)
    flora = flora_dist.deepspeed.attach(engine)

    def backward(loss: Tensor, is_last: bool) -> None:
        engine.backward(loss)
        if not is_last:
            engine.step()  # counts the micro-batch

    def masters() -> list[Tensor]:
        return list(flora.state)  # stage 3 shows its groups' tensors during a step alone

    return Run(
        model=model,
        optimizer=flora,
        masters=masters,
        loss=lambda tokens, _: loss_of(engine, tokens),
        backward=backward,
        step=engine.step,
        close=engine.destroy,
    )


BACKENDS: dict[str, Callable[[Case], Run]] = {
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    **{f"zero{stage}": _zero(stage) for stage in (0, 1, 2, 3)},
}
"""Name -> how a run on all ranks of the default group begins."""
