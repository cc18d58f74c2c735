# SPDX-License-Identifier: Apache-2.0
"""A small language model, its samples, and hosts' modes as a process of a pool can have them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 40, "vocab_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
SETTINGS: dict[str, Any] = {"rank": 4, "block": 16, "kappa": 3, "state_dtype": "float32"}
LR, DECAY, MAX_NORM = 1e-2, 0.1, 0.5
"""The norm of the gradients is above MAX_NORM: clipping counts."""
SAMPLES, LENGTH, STEPS = 8, 12, 6
MODES = ("plain", "ddp", "fsdp2", "zero2", "zero3", "offload")


def build() -> LlamaForCausalLM:
    """The model, the same in every process."""
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


def blank() -> LlamaForCausalLM:
    """The model with zeros for weights: a run that goes on from a checkpoint must load them."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """As many as a step takes, so that every step sees the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, SIZES["vocab_size"], (SAMPLES, LENGTH), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def zero_config(mode: str, **blocks: Any) -> dict[str, Any]:
    """As a Trainer's user writes it, with "auto"."""
    zero: dict[str, Any] = {"stage": 3 if mode == "zero3" else 2}
    if mode == "offload":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 10**9,
        **blocks,
    }


def is_zero(mode: str) -> bool:
    return mode in {"zero2", "zero3", "offload"}


@contextmanager
def host_of(mode: str) -> Iterator[None]:
    """A process as ``accelerate launch`` would start it for a mode; forgotten at the end."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        # On CPUs accelerate 1.15 makes DDP of FSDP without a word (accelerate/state.py).
        original(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def backend(*_: Any) -> tuple[str | None, DistributedType]:
        # On CPUs it takes ranks for one another's only with use_cpu, which excludes DeepSpeed.
        single = mode == "plain"
        return (None, DistributedType.NO) if single else ("gloo", DistributedType.MULTI_CPU)

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    before = dict(os.environ)
    if is_zero(mode):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        with (
            patch.object(AcceleratorState, "__init__", init),
            patch.object(PartialState, "_prepare_backend", backend),
        ):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        forget()


def whole_weights(model: Any) -> dict[str, Tensor]:
    """On every rank, by the model's own names."""
    named = dict(getattr(model, "module", model).named_parameters())
    if any(hasattr(p, "ds_id") for p in named.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: p.detach().clone() for name, p in named.items()}
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named.items()}
    return {name: p.detach().clone() for name, p in full.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest distance of a parameter over its movement from where it began."""
    assert set(found) == set(expected)
    start = {name: p.detach() for name, p in build().named_parameters()}
    return max(
        float((found[n] - expected[n]).norm() / (expected[n] - start[n]).norm()) for n in expected
    )
