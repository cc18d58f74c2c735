# SPDX-License-Identifier: Apache-2.0
"""What of a network trains, and how it computes: frozen weights, adapters, attention, layers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from flora_dist.trainer.chunked_loss import chunk_loss
from flora_dist.trainer.config_data import LoraConfig, ModelConfig
from flora_dist.trainer.optional_imports import needs_lora_extra


def arranged(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The network as the config wants it trained; before it is spread over processes.

    Raises:
        ValueError: no such attention or layers, a pattern without parameters, nothing to train, or
            a head whose loss cannot be computed in chunks.
    """
    theirs: Any = model
    if config.attention != "auto":
        try:
            theirs.set_attn_implementation(config.attention)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"model.attention must work on this model and machine; {config.attention!r} says: "
                f"{' '.join(str(error).split())} Use auto or sdpa."
            ) from error
    if config.checkpointing:
        # Reentrant checkpointing would run no hook of a wrapper around the layer.
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    if config.loss_chunk is not None:
        chunk_loss(model, config.loss_chunk)
    _freeze(model, config)
    trained = model if config.lora is None else with_adapters(model, config.lora)
    if config.compile:
        for layer in layers_of(trained):
            layer.compile()
    return trained


def _freeze(model: nn.Module, config: ModelConfig) -> None:
    if config.frozen and config.lora is not None:
        raise ValueError(
            f"model.lora freezes the whole network; model.frozen={list(config.frozen)}. Remove one."
        )
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.frozen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"model.frozen must name parameters; none is like {pattern!r}. They are called "
                f"{names[0]}, {names[-1]} and so on. Correct the pattern."
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, each) for each in config.frozen))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"something must be left to train; model.frozen={list(config.frozen)} names all "
            "parameters. Take some out."
        )


def with_adapters(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The network inside peft's wrapper: its adapters train, and nothing else.

    Raises:
        ValueError: no layer has such a name.
    """
    with needs_lora_extra():
        import peft
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules="all-linear" if config.targets is None else list(config.targets),
        task_type="CAUSAL_LM",
    )
    try:
        wrapped: nn.Module = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(
            f"model.lora.targets must name linear layers; {config.targets} gave: "
            f"{' '.join(str(error).split())} Correct it, or set it to null for all."
        ) from error
    return wrapped


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer's layers: the children of the ModuleList that holds most weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    return list(max(lists, key=lambda layers: sum(map(_weights, layers))))


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
